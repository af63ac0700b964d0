"""What SLURM's environment says about this process."""

from __future__ import annotations

import os


def slurm_tasks() -> int:
    """Return how many tasks of this program srun started; 0: this is not one of several.

    The step's own count is what matters. SLURM_NTASKS is the job's in a batch script and in shells:
    those of `salloc` (a step of one task, with an id above all others) and of `srun --pty`. A shell
    of `srun --pty -n2` is one of two tasks; what is typed there has the shell's terminal and is
    not the task itself, while other tasks have no terminal.
    """
    env = os.environ
    count = env.get("SLURM_STEP_NUM_TASKS", "")
    if not count.isdigit() or int(count) < 2 or "SLURM_PROCID" not in env:
        return 0
    typed = _has_terminal() and env.get("SLURM_TASK_PID") != str(os.getpid())
    return 0 if typed else int(count)


def _has_terminal() -> bool:
    """Return whether this process has a controlling terminal, wherever its output goes."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
