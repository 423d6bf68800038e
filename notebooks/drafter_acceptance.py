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
# # Acceptance of a drafter
#
# How many of a block's drafted tokens the target keeps, from results that were measured before. `REPORT` is the report
# of a demo, or anything `speedstack report` made of a run with a drafter.

# %% tags=["parameters"]
REPORT = "../results/2026-11-21-demo-tiny-intel.json"

# %%
# %matplotlib inline
from speedstack.eval.figures import survival, tokens_by_block
from speedstack.eval.results import Report

acceptance = Report.load(REPORT).acceptance
overall = acceptance.overall
print(
    f"{overall.acceptance_length:.2f} tokens a round over {overall.num_rounds} rounds, "
    f"{overall.mean_of_responses:.2f} as the mean of {overall.num_prompts} texts; "
    f"blocks of {acceptance.block_size}, temperature {acceptance.temperature:g}"
)

# %% [markdown]
# ## How deep into a block do drafts survive?

# %%
survival(acceptance)

# %% [markdown]
# ## How long should a block be?
#
# Tokens a round if only the first *k* positions were drafted. Where a curve is flat, longer blocks cost rows of the
# target and give nothing.

# %%
tokens_by_block(acceptance)
