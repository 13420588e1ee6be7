"""From a lab's tables to a device."""

from .measurements import fit_measurements
from .result import Candidate, Fit

__all__ = ["Candidate", "Fit", "fit_measurements"]
