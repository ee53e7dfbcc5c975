"""Policies: rules that select the modules to train, with method and rank, and their resolution on a model."""

from milora_vl.core.policy.policy import Policy
from milora_vl.core.policy.rules import PolicyError, Rule, RuleMethod, Target

__all__ = ["Policy", "PolicyError", "Rule", "RuleMethod", "Target"]
