"""The machine that a command runs on: device, precision, processes, signals, random streams."""
import ctypes
import hashlib
import inspect
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from images import SettingsError, one_line
from support.output import in_main_thread


def reseed(*key):
    """All randomness after this is a function of `key`."""
    torch.manual_seed(hashed(key))


def hashed(key: tuple) -> int:
    """63 bits of the whole key: torch's CPU generator keeps 32 bits of a seed only, so neighbours would collide."""
    return random.Random(repr(key)).getrandbits(63)


def stream(device: torch.device | str, *key, before: torch.Generator | None = None) -> torch.Generator:
    """A random stream of its own on `device`, a function of `key`; `before`, if given, is the one that is seeded."""
    return (before or torch.Generator(device)).manual_seed(hashed(key))


# ------------------------------------------------------------------------------------------------ device and precision

def pick_device(name: str = "auto") -> torch.device:
    """auto, cpu, cuda or cuda:N -> the device; of several GPUs this process's own. Raises SettingsError."""
    world = processes()[1]
    if name not in ("auto", "cpu", "cuda") and not name.startswith("cuda:"):
        raise SettingsError(f"device = {name!r}: allowed is auto, cuda, cuda:1 or cpu")
    if name.startswith("cuda:") and world > 1:
        raise SettingsError(f"device = {name!r}: allowed is auto, cuda or cpu where several processes train, "
                            "each on a GPU of its own")
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    own = f"cuda:{os.environ['LOCAL_RANK'] if world > 1 else 0}"
    try:
        device = torch.device(name if ":" in name else own)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as failure:
        raise SettingsError(f"device = {name!r}: allowed is auto, cpu, and a GPU for each process of the "
                            f"{torch.cuda.device_count()} GPUs that are there ({one_line(failure)[:100]})") from None
    return device


def bf16_helps(device: torch.device) -> bool:
    """Whether the chip computes in bf16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def set_up(device: torch.device, precision: str = "auto") -> str:
    """Makes `device` the current GPU, with TF32 for what stays float32; -> the activations' precision."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        keep_freed_memory()
    if precision == "auto":
        if device.type == "cuda" and not bf16_helps(device) and torch.cuda.get_device_capability(device) >= (7, 0):
            return "fp16"  # a V100 or T4
        return "bf16" if bf16_helps(device) else "fp32"
    return precision


def keep_freed_memory():
    """From now on the C library keeps what is freed for the next tensor, if it is glibc and the user left it alone.

    Else each training step waits for tens of thousands of pages that the system clears and maps again
    (benchmarks/README.md).
    """
    set_by_user = any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ)
    if platform.libc_ver()[0] != "glibc" or set_by_user:
        return
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h; a value is a C int
    mallopt = ctypes.CDLL(None).mallopt
    if not mallopt(mmap_threshold, 2**30):
        mallopt(mmap_threshold, 2**25)  # the most that old versions take
    mallopt(trim_threshold, 2**31 - 1)


def autocast(device: torch.device, precision: str):
    """Within it activations have the precision bf16, fp16 or fp32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def chip(device: torch.device) -> str:
    """The chip's name; of a CPU also whether it has AMX, which decides the speed of bf16, and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in older versions
    amx = " with AMX" if found.get("amx_bf16") else ""
    return f"{found.get('cpu_name', 'CPU')}{amx}, threads: {torch.get_num_threads()}"


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether a GPU or the machine had no more memory: of the machine's, torch's allocator raises a RuntimeError."""
    return isinstance(failure, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(failure)


def code_version() -> str:
    """The program's git commit, with -dirty behind it where files were changed since; "unknown" outside of git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        here = Path(__file__).resolve().parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ------------------------------------------------------------------------------------------------------------ processes

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets for each process


def processes() -> tuple[int, int]:
    """This process's rank, and how many processes torchrun has started; (0, 1) where `environment_fault` finds one."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or environment_fault():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def environment_fault() -> str | None:
    """What is wrong with the variables by which torchrun tells a process of the others; None: all or none are there."""
    there = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
    if there.keys().isdisjoint({"RANK", "WORLD_SIZE"}) or there.get("WORLD_SIZE") == "1":
        return None
    if missing := [name for name in TORCHRUN if name not in there]:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    rank, world, *others = (there[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    if not all(each.isdecimal() for each in (rank, world, *others)) or int(rank) >= int(world):
        return f"RANK = {rank!r} of WORLD_SIZE = {world!r}, LOCAL_RANK = {others[0]!r}, MASTER_PORT = {others[1]!r}"
    return None


def check_environment():
    """Raises SettingsError where a parent job or an IDE left a part of torchrun's environment. To go on alone would
    be wrong where the others are there after all."""
    if fault := environment_fault():
        left = " ".join(name for name in TORCHRUN if name in os.environ)
        raise SettingsError(f"the environment is not one of torchrun's: {fault}; start by torchrun, or for one process "
                            f"alone: unset {left}")


def partition(named: str | None) -> tuple[int, int]:
    """2/4 -> (2, 4): which of how many processes this is, that share the work; None: as torchrun says. Raises
    SettingsError."""
    if named is None:
        return processes()
    number, _, count = named.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise SettingsError(f"partition = {named!r}: allowed is 0/4 to 3/4 for four processes, and so on")
    return int(number), int(count)


def join_processes(device: torch.device):
    """Lets the processes talk; of one process it does nothing. Raises SettingsError where the others do not come."""
    if processes()[1] > 1 and not dist.is_initialized():
        gpu = device if device.type == "cuda" else None
        others = f"other processes at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        alone = f"for one process alone: unset {' '.join(TORCHRUN)}"
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        except (RuntimeError, ValueError, OSError) as failure:
            raise SettingsError(f"no {others} ({one_line(failure)[:100]}); {alone}") from None
        # torchrun keeps its store when it starts lost processes again: they must not find the addresses of before
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # the others wait for the first one while it reads the data set, and while it samples
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(hours=6), device_id=gpu)


def leave_processes():
    """Nobody leaves while the first process writes."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class ProcessLost(RuntimeError):
    """Another of the processes is no longer there."""


def collective(call: Callable, *args):
    """call(*args), of torch.distributed. Raises ProcessLost where another process has ended."""
    try:
        return call(*args)
    except RuntimeError as failure:
        time.sleep(1)  # what ended that one may be a Ctrl-C, which comes to this one too: then it ends here
        raise ProcessLost(f"another process has ended ({one_line(failure)[:100]})") from None


def all_gather(value) -> list:
    """What each process has, plain values and CPU tensors, in all of them, by rank. Raises ProcessLost."""
    found = [value] * processes()[1]
    if len(found) > 1:
        collective(dist.all_gather_object, found, value)
    return found


def broadcast(make: Callable):
    """make() of the first process, plain values and CPU tensors, in all of them. Raises ProcessLost."""
    rank, world = processes()
    found = [make() if rank == 0 else None]
    if world > 1:
        collective(dist.broadcast_object_list, found)
    return found[0]


@contextmanager
def settings_for_all():
    """A SettingsError in one process is raised in all of them, where they leave what is within. Raises ProcessLost."""
    failure = None
    try:
        yield
    except SettingsError as caught:
        failure = caught
    for failure in all_gather(failure):
        if failure is not None:
            raise failure


def agree(**values):
    """Raises SettingsError, the same line in all processes, where the reprs of their `values` differ. Raises
    ProcessLost."""
    mine = {name: repr(value) for name, value in values.items()}
    first, *others = all_gather(mine)
    for rank, theirs in enumerate(others, start=1):
        if different := [name for name in mine if theirs[name] != first[name]]:
            raise SettingsError(f"process {rank} differs from process 0 in {', '.join(different)}: allowed are the "
                                "same settings, checkpoint and data for all")


def digest(tensors) -> str:
    """Of the tensors' bytes, for `agree`."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def failed(command: str, failure: Exception, memory_advice: str) -> int:
    """Tells of a failure in one line -> the command's exit status: 2 bad input, 1 it broke off.

    Raises the failure again where it is a fault of the program.
    """
    why = one_line(failure)
    lost = ("gloo/transport", "NCCL", "Connection closed by peer", "Connection reset by peer")  # in a backward pass
    if isinstance(failure, SettingsError):
        print(f"{command}: {failure}", file=sys.stderr)
        return 2
    if is_out_of_memory(failure):
        print(f"{command}: out of memory; {memory_advice}", file=sys.stderr)
    elif isinstance(failure, ProcessLost) or processes()[1] > 1 and any(word in why for word in lost):
        print(f"{command}: another process has ended, and so does this one ({why[:100]})", file=sys.stderr)
    elif isinstance(failure, FloatingPointError | OSError):  # weights or gradients not finite; a full disk
        print0(f"{command}: {why}", file=sys.stderr)
    else:
        raise failure
    return 1


def print0(text: str, file=None):
    """Prints a line, in the first process only."""
    if processes()[0] == 0:
        print(text, file=file, flush=True)


def data_parallel(module: nn.Module) -> nn.Module:
    """The module as processes train it together: its gradients become their mean while the backward pass goes on."""
    if processes()[1] == 1:
        return module
    device = next(module.parameters()).device
    gpus = [device] if device.type == "cuda" else None
    # buffers are the same everywhere; torch 2.14 has a new name for leaving them alone
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(module, device_ids=gpus, **{buffers: False})


def no_sync(module: nn.Module):
    """Within it, gradients add up in this process; the first backward pass after it shares the sum."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


@contextmanager
def first_process_first():
    """The others come to what is within when the first process has done it, or failed: a download, say.

    Raises ProcessLost.
    """
    rank, world = processes()
    if rank:
        collective(dist.barrier)
    try:
        yield
    finally:
        if world > 1 and rank == 0:
            collective(dist.barrier)


# -------------------------------------------------------------------------------------------------------------- signals

class Signals:
    """SIGINT, SIGTERM and SIGHUP while a run trains. The first one ends the run after its step, or cuts short what is
    within `interruption`; a second one ends it at once, by KeyboardInterrupt.

    What comes within a second counts as one: a scheduler may signal each process, and torchrun then does so again.
    """

    def __init__(self):
        self.number, self.came, self.interruptible = 0, None, False  # the last signal, when the first came

    def __enter__(self) -> "Signals":
        self.before = {}
        if not in_main_thread():  # whose handlers they are
            return self
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows knows no SIGHUP
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup has it ignored
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        now, again, self.number = time.monotonic(), self.came is not None, number
        if again and now - self.came < 1:
            return
        self.came = now
        if again or self.interruptible:
            raise KeyboardInterrupt
        # nothing is printed here: where the signal came as something was being printed, Python raises an exception

    @contextmanager
    def interruption(self):
        """What is within is cut short by the first signal: it raises KeyboardInterrupt there, or as it is left."""
        try:
            self.interruptible = True
            yield
        finally:
            self.interruptible = False

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    def agreed(self, device: torch.device) -> int:
        """The signal that any of the processes got, or 0: it reaches them in different steps."""
        asked = torch.tensor(self.number, device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return int(asked)
