"""The verification suite: the enumerable world, and `certify`, for our mathematics and theirs."""

from minirlhf.verify.catalogue import KINDS
from minirlhf.verify.certify import certify
from minirlhf.verify.pytest_entry import certify_test
from minirlhf.verify.report import Report
from minirlhf.verify.subject import SubjectError

__all__ = ["KINDS", "Report", "SubjectError", "certify", "certify_test"]
