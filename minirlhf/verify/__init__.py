"""The verification suite: the enumerable world, and `certify`, for our mathematics and theirs."""

from minirlhf.verify.catalogue import KINDS
from minirlhf.verify.certify import certify
from minirlhf.verify.goals import dpo_population, ipo_population, ipo_summed_population, kl_regularised
from minirlhf.verify.pytest_entry import certify_test
from minirlhf.verify.report import Report
from minirlhf.verify.subject import SubjectError
from minirlhf.verify.trainers import TrainerReport, certify_trainer
from minirlhf.verify.world import small_world

__all__ = [
    "KINDS",
    "Report",
    "SubjectError",
    "TrainerReport",
    "certify",
    "certify_test",
    "certify_trainer",
    "dpo_population",
    "ipo_population",
    "ipo_summed_population",
    "kl_regularised",
    "small_world",
]
