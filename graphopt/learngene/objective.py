"""What a student is trained to: a teacher's distribution, labels, or both."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Divide = Literal["elements", "rows"]


def distillation_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    *,
    alpha: float = 1.0,
    temperature: float = 1.0,
    divide: Divide = "elements",
    smoothing: float = 0.0,
) -> Tensor:
    """Return (1 - alpha) * CE + alpha * T^2 * KL(teacher || student) / divisor.

    student, teacher: logits [rows, classes]; labels: [rows]. The logits are divided by
    the ``temperature`` T for KL alone. The divisor is rows * classes as in the paper's
    code (``elements``), which makes KL small against CE, or ``rows``: the mean over the
    batch, as Hinton et al. (2015) have it. ``smoothing`` is that of CE's labels.
    """
    student = student.float()
    loss = student.new_zeros(())
    if alpha < 1.0:
        assert labels is not None
        hard = F.cross_entropy(student, labels, label_smoothing=smoothing)
        loss = loss + (1.0 - alpha) * hard
    if alpha > 0.0:
        assert teacher is not None
        logs = F.log_softmax(student / temperature, -1)
        wanted = F.log_softmax(teacher.float() / temperature, -1)
        total = F.kl_div(logs, wanted, reduction="sum", log_target=True)
        divisor = student.numel() if divide == "elements" else len(student)
        loss = loss + alpha * temperature**2 * total / divisor
    return loss
