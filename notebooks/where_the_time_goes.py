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
# # Where the time goes
#
# Decoding speed against peers in the same run, and the stages of a whole demo, from results that were measured before.
# `REPORT` is a run, a result file or a report: the directory of a demo, `timing.json` of `speedstack bench`, or
# anything that `speedstack report` made. What it lacks, a line says in place of the figure.

# %% tags=["parameters"]
REPORT = "../results/2026-11-21-demo-tiny-intel.json"

# %%
# %matplotlib inline
from pathlib import Path

from speedstack.eval.report.figures import decode_rates, stage_times, time_per_text
from speedstack.eval.report.gather import gather
from speedstack.eval.report.notebook import show, timing_text

report = gather([Path(REPORT)], title=REPORT)
show(timing_text, report.timing, report.environment)

# %% [markdown]
# ## How fast is decoding?

# %%
show(decode_rates, report.timing)

# %% [markdown]
# ## What does a user wait for?
#
# The first token takes the whole prompt through the model; the others come one by one, or a block at a time.

# %%
show(time_per_text, report.timing)

# %% [markdown]
# ## What does a demo spend its time on?

# %%
show(stage_times, report.stages)
