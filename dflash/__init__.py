"""DFlash block drafting: the drafter network, its training objective, the acceptance rule and its checkpoint format."""
