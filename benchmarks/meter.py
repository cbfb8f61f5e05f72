"""The clock and the power of a GPU while something runs on it, by NVML or nvidia-smi; where neither is, nothing."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator

import torch

SECONDS = 0.05  # from one reading to the next
KEPT = 4096  # readings


class Meter:
    """Reads in the background from `start` on."""

    def __init__(self):
        self._readings, self._first = deque(maxlen=KEPT), threading.Event()

    def start(self) -> bool:
        """Whether there is anything to read."""
        source = _by_nvml() or _by_nvidia_smi()
        if source is None:
            return False
        threading.Thread(target=self._read, args=(source,), daemon=True).start()
        return self._first.wait(timeout=10)

    def _read(self, source: Iterator[tuple[float, float]]) -> None:
        for reading in source:
            self._readings.append((time.perf_counter(), *reading))
            self._first.set()

    def between(self, start: float, end: float) -> dict[str, float]:
        """The median clock and the mean power of that time (of `time.perf_counter`); empty if nothing was read then."""
        readings = [reading for reading in list(self._readings) if start <= reading[0] <= end]
        if not readings:
            return {}
        _, clocks, watts = zip(*readings)
        return {"sm_mhz": statistics.median(clocks), "watts": round(statistics.fmean(watts), 1)}


def _uuid() -> str:
    """Of torch's current GPU, whatever CUDA_VISIBLE_DEVICES makes of its number."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _by_nvml() -> Iterator[tuple[float, float]] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(_uuid())
        pynvml.nvmlDeviceGetPowerUsage(gpu)
    except Exception:  # neither the package nor the driver need be there
        return None

    def readings():
        while True:
            clock = pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)
            yield clock, pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3
            time.sleep(SECONDS)

    return readings()


def _by_nvidia_smi() -> Iterator[tuple[float, float]] | None:
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    try:
        command += [f"--loop-ms={round(1e3 * SECONDS)}", f"--id={_uuid()}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except Exception:
        return None

    def readings():
        try:
            for line in process.stdout:
                try:
                    clock, watts = map(float, line.split(","))
                except ValueError:  # [N/A], or an error
                    return
                yield clock, watts
        finally:
            process.kill()

    return readings()
