# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Precision against accuracy
#
# What rounding the experts costs, from results that were measured before: this notebook reads and plots, it runs no
# model. `REPORT` is the report of a demo, `COMPARISON` what `speedstack compare A.json B.json --out x.json` wrote, and
# `GRID` the results.json of `speedstack ablate`.

# %% tags=["parameters"]
REPORT = "../results/2026-11-21-demo-tiny-intel.json"
COMPARISON = "../results/2026-11-21-suite-offline-tiny.json"
GRID = "../results/2026-11-21-ablation-tiny.json"

# %%
# %matplotlib inline
from IPython.display import Markdown

from speedstack.eval.ablation import AblationGrid
from speedstack.eval.ablation_figures import grid_score_by_bits, kl_by_bits, kl_by_bytes, kl_by_speed, tau_by_bits
from speedstack.eval.compare import Comparison
from speedstack.eval.figures import divergence, score_by_bits, suite_differences
from speedstack.eval.results import Report
from speedstack.quant.formats import number_format

report, comparison, grid = Report.load(REPORT), Comparison.load(COMPARISON), AblationGrid.load(GRID)
NAMES = {
    "full precision": "full precision",
    "MXFP4, rounded": "MXFP4, rounded to nearest",
    "MXFP4, distilled": "MXFP4, distilled (QAD)",
    "INT2, rounded": "INT2, bad on purpose",
}
mxfp4, int2 = (number_format(name).bits_per_weight for name in ("mxfp4", "int2_g32"))
BITS = {"full precision": 32.0, "MXFP4, rounded": mxfp4, "MXFP4, distilled": mxfp4, "INT2, rounded": int2}

# %% [markdown]
# ## How far is the quantized model from the one it was made of?
#
# KL divergence of the next-token distributions, on the same held-out text.

# %%
divergence(report.quality)

# %% [markdown]
# ## How often does it write the same text?
#
# Greedy continuations of held-out code, 32 tokens: the share that is word for word the full-precision model's.

# %%
score_by_bits(comparison, "speedstack_same_text", BITS, NAMES)

# %% [markdown]
# ## What of the scores is recovered, and what is chance?
#
# A recovery above 100 % is no mistake of the plot: on a small model a coarse rounding can help at a task, here at
# closing a line, where a lone colon is right half of the time. Divergence and same text are the measures to trust.

# %%
suite_differences(comparison, NAMES)

# %%
Markdown(comparison.markdown())

# %% [markdown]
# ## Formats, modules and methods: the whole grid
#
# Every point is a model, made from the same full-precision one. At equal bits, what separates points is where the bits
# are spared, and how the weights were chosen.

# %%
kl_by_bits(grid)

# %% [markdown]
# Bits saved where there are few weights save few bytes.

# %%
kl_by_bytes(grid)

# %% [markdown]
# What the bytes buy in speed is the cost model's prediction; a drafter buys more than any format of a model this small,
# whose steps are hand-offs rather than bytes. Tokens/s that were measured are in the table below.

# %%
kl_by_speed(grid)

# %%
grid_score_by_bits(grid)

# %% [markdown]
# ## Does a drafter notice the target's precision?
#
# A drafter trained for the full-precision model, drafting for targets of less and less precision, and drafters trained
# for those targets.

# %%
tau_by_bits(grid)

# %%
Markdown(grid.table())
