"""`python -m speedstack`, the form that torchrun starts: `torchrun --nproc-per-node 2 -m speedstack pretrain ...`."""

import sys

from speedstack.cli import main

sys.exit(main())
