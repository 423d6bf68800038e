# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where the time goes
#
# Decoding speed against peers in the same run, and the stages of a whole demo, from results that were measured before.

# %% tags=["parameters"]
REPORT = "../results/2026-11-21-demo-tiny-intel.json"

# %%
# %matplotlib inline
from speedstack.eval.figures import decode_rates, stage_times, time_per_text
from speedstack.eval.results import Report

report = Report.load(REPORT)
timing = report.timing
machine = timing.environment or report.environment
print(f"{machine.cpu_model}, {machine.num_cores} cores, {timing.num_prompts} prompts, {timing.num_repeats} repeats")
for name in ("engine + drafter", "transformers"):
    print(f"{name} against engine: {timing.speedup(name, 'engine'):.2f}x")

# %% [markdown]
# ## How fast is decoding?

# %%
decode_rates(timing)

# %% [markdown]
# ## What does a user wait for?
#
# The first token takes the whole prompt through the model; the others come one by one, or a block at a time.

# %%
time_per_text(timing)

# %% [markdown]
# ## What does a demo spend its time on?

# %%
stage_times(report.stages)
