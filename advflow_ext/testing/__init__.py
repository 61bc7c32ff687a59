"""Helpers for testing losses built on this package; ``strategies`` needs hypothesis, the rest torch alone."""

from advflow_ext.testing.compare import (
    ACCUMULATED_ERROR,
    UNIT_ROUNDOFF,
    assert_close_to_truth,
    assert_rounded_once,
    relative_error,
)

__all__ = ["ACCUMULATED_ERROR", "UNIT_ROUNDOFF", "assert_close_to_truth", "assert_rounded_once", "relative_error"]
