"""What became of a worker, in one sentence: who, what it was doing, and why it could not go on."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_mm_rl.platforms import processes

_SENTENCE_CHARACTERS = 600
_LOG_LINES = 60
_SOMEBODY_ELSES_FAULT = re.compile(
    r"closed by peer|timed? ?out waiting|connection (reset|refused|closed)|broken pipe|socket (timeout|closed)|watchdog|gloo", re.IGNORECASE
)
"""What a collective says on the ranks that are well when another one is gone or silent."""
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|running low on memory", re.IGNORECASE)
_MACHINE_GONE = re.compile(r"its node has died|node (died|is dead|failure)|raylet.*(died|terminated)", re.IGNORECASE)
_DISK_FULL = re.compile(r"no space left on device|errno 28|disk quota exceeded", re.IGNORECASE)
_MEMORY_ADVICE = {
    "trainer rank": "lower rl_config.max_packing_token_size",
    "critic rank": "lower rl_config.max_packing_token_size",
    "vision rank": "lower megatron_training.max_pixels",
    "rollout replica": "lower generate_config.max_num_seqs or generate_config.kv_cache_bytes",
}


class WorkerFailed(RuntimeError):
    """A worker process raised, died, or was silent for too long; the message says which and why."""

    log: str = ""
    """The end of what the worker wrote, where it can be read from here."""


class WorkerDied(WorkerFailed):
    """The process is gone; another one may take its place."""


@dataclass(frozen=True)
class Member:
    """A worker process as people know it. Example: str(member) == "trainer rank 1 (pid 812 on 10.0.0.3)"."""

    role: str
    number: int
    actor: Any = field(repr=False, compare=False)
    pid: int = 0
    node: str = ""
    log_folder: str = ""
    """Where the worker's output goes, when this process can read it; else empty."""
    memory_kills: int | None = None
    """Of its machine, when it was started."""
    rank: int | None = None
    """Where several processes are one member of the run: which of them."""

    def __str__(self) -> str:
        name = f"{self.role} {self.number}" if self.rank is None else f"rank {self.rank} of {self.role} {self.number}"
        return f"{name} (pid {self.pid} on {self.node})" if self.pid else name

    @property
    def is_local(self) -> bool:
        return bool(self.log_folder)


def first_sentence(error: BaseException) -> str:
    """The first line of what an exception says; the rest of it is for the log."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else "it says nothing more"
    shown = line if len(line) <= _SENTENCE_CHARACTERS else line[:_SENTENCE_CHARACTERS] + " ..."
    told = isinstance(error, ValueError | RuntimeError | OSError)
    return shown.rstrip(".") if told else f"{type(error).__name__}: {shown.rstrip('.')}"


def cause_of(error: BaseException, role: str = "") -> str:
    """Why something raised, with what to do where that is known."""
    text = str(error)
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
        advice = _MEMORY_ADVICE.get(role)
        return f"out of memory: {first_sentence(error)}" + (f"; {advice}" if advice else "")
    if _DISK_FULL.search(text):
        return f"the disk is full: {first_sentence(error)}"
    return first_sentence(error)


def blames_others(error: BaseException) -> bool:
    """Whether the exception only says that another rank is gone or silent."""
    return not isinstance(error, ValueError) and bool(_SOMEBODY_ELSES_FAULT.search(str(error)))


def raised(member: Member, doing: str, error: BaseException) -> Exception:
    """For an exception of the worker's own. A ValueError is for the user to mend and stays one."""
    kind = ValueError if isinstance(error, ValueError) else WorkerFailed
    return kind(f"{member} failed in {doing}: {cause_of(error, member.role)}")


def died(member: Member, doing: str, error: BaseException) -> WorkerFailed:
    """WorkerDied, unless its machine is gone: then there is no place for another one. error: what Ray raises for a process that is gone."""
    kind = WorkerFailed if _MACHINE_GONE.search(str(error)) else WorkerDied
    failure = kind(f"{member} died in {doing}: {_cause_of_death(member, str(error))}")
    failure.log = log_of(member)
    return failure


def _cause_of_death(member: Member, text: str) -> str:
    """Only the parent of a process is told how it ended, and that is Ray's daemon; so from what Ray, the log and the kernel say."""
    if _MACHINE_GONE.search(text):
        was_told = "received SIGTERM" in text
        return f"its machine {'left the run: Ray on it was told to end' if was_told else 'is gone, or Ray on it'}"
    if re.search(r"running low on memory|OutOfMemory", text):
        return f"out of memory: Ray ended it because its machine had little memory left{_advice(member)}"
    if "receives a SIGTERM" in text:
        return "killed by signal 15 (SIGTERM)"
    crash = re.findall(r"\*\*\* (SIG[A-Z]+) received", _native_log(member))
    if crash:
        return f"killed by signal {int(signal.Signals[crash[-1]])} ({crash[-1]})"
    code = re.search(r"exit code (\d+)", text)
    if code:
        return f"it ended with exit code {code[1]}"
    now = processes.memory_kills() if member.is_local else None
    if now is not None and member.memory_kills is not None and now > member.memory_kills:
        return f"out of memory: the kernel killed it by signal 9 (SIGKILL){_advice(member)}"
    if not member.is_local:
        return "killed by signal 9 (SIGKILL), by somebody or for want of memory, or its machine is gone"
    unknown = now is None or member.memory_kills is None
    return "killed by signal 9 (SIGKILL)" + (", by somebody or for want of memory" if unknown else "")


def _advice(member: Member) -> str:
    return f"; {_MEMORY_ADVICE[member.role]}" if member.role in _MEMORY_ADVICE else ""


def _native_log(member: Member) -> str:
    return "".join(_read_end(path) for path in _logs(member, "python-core-worker-*_{pid}.log"))


def log_of(member: Member) -> str:
    """The last lines that the worker wrote."""
    text = "".join(_read_end(path) for path in _logs(member, "worker-*-{pid}.err"))
    return "\n".join(text.splitlines()[-_LOG_LINES:])


def _logs(member: Member, pattern: str) -> list[Path]:
    return sorted(Path(member.log_folder).glob(pattern.format(pid=member.pid))) if member.is_local else []


def _read_end(path: Path) -> str:
    try:
        return path.read_bytes()[-20_000:].decode(errors="replace")
    except OSError:
        return ""
