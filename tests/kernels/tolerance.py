"""How wrong may a kernel be? Twice as wrong as naive code in the same dtype, plus one rounding, against float64."""

import torch


def error(actual: torch.Tensor, truth: torch.Tensor, floor: float = 0.0) -> float:
    """The largest error relative to the truth's largest entry, or to `floor` where that is more: one number, comparable
    between implementations."""
    truth = truth.to(torch.float64)
    actual = actual.to(torch.float64)
    same = (actual == truth) | (actual.isnan() & truth.isnan())  # equal infinities and NaNs are no error
    difference = torch.where(same, 0.0, actual - truth).abs()
    if difference.numel() == 0:
        return 0.0
    finite = truth[truth.isfinite()].abs()
    return float(difference.max()) / max(float(finite.max()) if finite.numel() else 0.0, floor, 1e-300)


def assert_as_good_as_naive(*, actual, naive, truth, name, dtype=None):
    """error(actual) <= 2 x (error(naive) + one rounding).

    actual: the result under test; naive: the same in plain code and the same dtype; truth: the same in float64.
    dtype: where one rounding is judged (default: actual's). Prints both errors when it fails.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    rounding = torch.finfo(dtype or actual.dtype).eps / 2
    ours, theirs = error(actual, truth), error(naive, truth)
    if (dtype or actual.dtype) == torch.float64:  # its own truth: allow it a hundred roundings
        theirs = 50 * rounding
    assert ours <= 2 * (theirs + rounding), (
        f"{name}: relative error {ours:.3e} against float64; naive code in the same dtype errs {theirs:.3e}, "
        f"one rounding is {rounding:.1e}, so at most {2 * (theirs + rounding):.3e} is allowed"
    )
