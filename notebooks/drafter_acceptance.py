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
# # Acceptance of a drafter
#
# How many of a block's drafted tokens the target keeps, from results that were measured before. `REPORT` is a run, a
# result file or a report: the directory of a demo, `acceptance.json` of `speedstack bench` with a drafter, or anything
# that `speedstack report` made. What it lacks, a line says in place of the figure.

# %% tags=["parameters"]
REPORT = "../results/2026-11-21-demo-tiny-intel.json"

# %%
# %matplotlib inline
from pathlib import Path

from speedstack.eval.report.figures import survival, tokens_by_block
from speedstack.eval.report.gather import gather
from speedstack.eval.report.notebook import acceptance_text, show

acceptance = gather([Path(REPORT)], title=REPORT).acceptance
show(acceptance_text, acceptance)

# %% [markdown]
# ## How deep into a block do drafts survive?

# %%
show(survival, acceptance)

# %% [markdown]
# ## How long should a block be?
#
# Tokens a round if only the first *k* positions were drafted. Where a curve is flat, longer blocks cost rows of the
# target and give nothing.

# %%
show(tokens_by_block, acceptance)
