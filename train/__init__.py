"""Training: configuration, corpus, one loop with exact resume, and the recipes pretrain, qat and drafter."""
