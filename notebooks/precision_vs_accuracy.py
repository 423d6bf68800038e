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
# model. `REPORT` is a run, a result file or a report (the directory of a demo, `quality.json` of `speedstack eval`, or
# anything that `speedstack report` made), `COMPARISON` what `speedstack compare A.json B.json --out x.json` wrote, and
# `GRID` the results.json of `speedstack ablate`; an empty string where there is none. What they lack, a line says in
# place of the figure.
#
# Of the results that were compared, `NAMES` says how they are shown, and `BITS` what a weight of their experts takes;
# both may have more than there are, and fewer.

# %% tags=["parameters"]
REPORT = "../results/2026-11-21-demo-tiny-intel.json"
COMPARISON = "../results/2026-11-21-suite-offline-tiny.json"
GRID = "../results/2026-11-21-ablation-tiny.json"
TASK = "speedstack_same_text"
NAMES = {
    "MXFP4, rounded": "MXFP4, rounded to nearest",
    "MXFP4, distilled": "MXFP4, distilled (QAD)",
    "INT2, rounded": "INT2, bad on purpose",
}
BITS = {"full precision": 32.0, "MXFP4, rounded": 4.25, "MXFP4, distilled": 4.25, "INT2, rounded": 2.5}

# %%
# %matplotlib inline
from pathlib import Path

from speedstack.eval.report.ablation_figures import (
    grid_score_by_bits,
    kl_by_bits,
    kl_by_bytes,
    kl_by_speed,
    tau_by_bits,
)
from speedstack.eval.report.figures import divergence, score_by_bits, suite_differences
from speedstack.eval.report.gather import gather
from speedstack.eval.report.notebook import comparison_table, grid_table, load, show
from speedstack.eval.results.ablation import AblationGrid
from speedstack.eval.results.suite import Comparison

report = gather([Path(REPORT)], title=REPORT)
comparison, grid = load(Comparison, COMPARISON), load(AblationGrid, GRID)

# %% [markdown]
# ## How far is the quantized model from the one it was made of?
#
# KL divergence of the next-token distributions, on the same held-out text.

# %%
show(divergence, report.quality)

# %% [markdown]
# ## How often does it write the same text?
#
# Greedy continuations of held-out code, 32 tokens: the share that is word for word the full-precision model's.

# %%
show(score_by_bits, comparison, TASK, BITS, NAMES)

# %% [markdown]
# ## What of the scores is recovered, and what is chance?
#
# A recovery above 100 % is no mistake of the plot: on a small model a coarse rounding can help at a task, here at
# closing a line, where a lone colon is right half of the time. Divergence and same text are the measures to trust.

# %%
show(suite_differences, comparison, NAMES)

# %%
show(comparison_table, comparison)

# %% [markdown]
# ## Formats, modules and methods: the whole grid
#
# Every point is a model, made from the same full-precision one. At equal bits, what separates points is where the bits
# are spared, and how the weights were chosen.

# %%
show(kl_by_bits, grid)

# %% [markdown]
# Bits saved where there are few weights save few bytes.

# %%
show(kl_by_bytes, grid)

# %% [markdown]
# What the bytes buy in speed is the cost model's prediction; a drafter buys more than any format of a model this small,
# whose steps are synchronizations rather than bytes. Tokens/s that were measured are in the table below.

# %%
show(kl_by_speed, grid)

# %%
show(grid_score_by_bits, grid)

# %% [markdown]
# ## Does a drafter notice the target's precision?
#
# A drafter trained for the full-precision model, drafting for targets of less and less precision, and drafters trained
# for those targets.

# %%
show(tau_by_bits, grid)

# %%
show(grid_table, grid)
