"""Which modules train, and how: rules, selectors, ranks from spectra, and their resolution on a model."""

from milora_vl.policy.policy import Policy
from milora_vl.policy.protect import Protect
from milora_vl.policy.rules import FloorSigma, PolicyError, Rule, RuleMethod, SpectralRank, Target

__all__ = ["FloorSigma", "Policy", "PolicyError", "Protect", "Rule", "RuleMethod", "SpectralRank", "Target"]
