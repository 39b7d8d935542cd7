"""recipes/finetune.py as a user runs it, with a fault at a chosen moment.

FAULT='{"at": "backward", "step": 5, "rank": 1}' accelerate launch … fault_worker.py ARGUMENTS_OF_FINETUNE
fault_worker.py serve        # a line of JSON in, a line of JSON out: runs are forked, so imports are paid once
"""

import json
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

from transformers import Trainer, TrainerCallback, TrainerState  # noqa: E402

import finetune  # noqa: E402

TIMEOUT = 180  # seconds, after which a run of the server counts as hung
KIB = 1024


def die(fault):
    if "seen" in fault:
        Path(fault["seen"]).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def limit_files(size, kill):
    """Let no file grow beyond `size` bytes: the kernel kills who writes on, or refuses the write."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)


class InStep(TrainerCallback):
    """What happens in the middle of a step, or while one waits for what happens outside."""

    def __init__(self, fault):
        self.fault = fault

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        at, step = self.fault["at"], self.fault["step"]
        if at == "backward" and state.global_step == step - 1:
            next(model.parameters()).register_hook(lambda gradient: die(self.fault))
        if at == "wait" and state.global_step >= step - 1:  # steps are slow from here on
            Path(self.fault["seen"]).touch()
            time.sleep(1)


def before(owner, name, step, act):
    """Do something when a method is called at a step."""
    original = getattr(owner, name)

    def wrapped(self, *args, **kwargs):
        if (self if isinstance(self, TrainerState) else self.state).global_step == step:
            act()
        return original(self, *args, **kwargs)

    setattr(owner, name, wrapped)


def delete_one_and_die(path, **kwargs):
    if Path(path).match("checkpoint-*") and Path(path).is_dir():
        next(Path(path).glob("*.safetensors")).unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def install(fault):
    rank = int(os.environ.get("RANK", "0"))
    if not fault or fault.get("rank", rank) != rank:
        return
    at, step = fault["at"], fault["step"]
    kill, refuse = fault.get("kill", True), fault.get("limit")
    if at in ("backward", "wait"):
        make = finetune.make_trainer

        def make_trainer(*args):
            trainer = make(*args)
            trainer.add_callback(InStep(fault))
            return trainer

        finetune.make_trainer = make_trainer
    elif at == "start":
        before(Trainer, "save_model", step, lambda: die(fault))
    elif at == "model.safetensors":
        before(Trainer, "save_model", step, lambda: limit_files(refuse or 1024 * KIB, kill))
    elif at == "optimizer.pt":
        before(Trainer, "_save_optimizer_and_scheduler", step, lambda: limit_files(refuse or 40 * KIB, kill))
    elif at == "rng_state":
        before(Trainer, "_save_rng_state", step, lambda: die(fault))
    elif at == "trainer_state.json":
        before(TrainerState, "save_to_json", step, lambda: limit_files(refuse or KIB, kill))
    elif at == "deleting":
        shutil.rmtree = delete_one_and_die
    else:
        raise ValueError(f"there is no fault '{at}'")


def run_rank(order, rank, port):
    """In a forked process: what torchrun sets, then the recipe."""
    if order["ranks"] > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "LOCAL_WORLD_SIZE": order["ranks"]}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    install(order.get("fault"))
    sys.argv = ["finetune.py", *order["argv"]]
    finetune.main()


def fork(order, rank, port):
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for descriptor in (1, 2):
                os.dup2(theirs, descriptor)
            os.close(ours)
            run_rank(order, rank, port)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(theirs)
    return pid, ours


def serve():
    """Read orders, answer with the exit status, the seconds and the words of every rank."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        start = time.time()
        processes = [fork(order, rank, port) for rank in range(order["ranks"])]
        answers = [{} for _ in processes]

        def follow(number, processes=processes, answers=answers, start=start):
            pid, pipe = processes[number]
            with os.fdopen(pipe, errors="replace") as words:
                said = words.read()
            _, status = os.waitpid(pid, 0)
            answers[number] = {"code": os.waitstatus_to_exitcode(status), "said": said, "end": time.time()}

        threads = [threading.Thread(target=follow, args=(number,)) for number in range(len(processes))]
        for thread in threads:
            thread.start()
        for number, thread in enumerate(threads):
            thread.join(max(0, TIMEOUT - (time.time() - start)))
            if thread.is_alive():
                os.kill(processes[number][0], signal.SIGKILL)
                thread.join()
                answers[number]["hung"] = True
        print(json.dumps(answers), file=out, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        install(json.loads(os.environ.get("FAULT", "null")))
        finetune.main()
