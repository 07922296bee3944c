"""One decode step of DeepSeek-V3 on two kinds of hardware: `python examples/estimate_step.py`."""

import moeplan as mp

estimates = {
    hardware: mp.estimate("deepseek-v3", hardware, nodes=9, gpus_per_node=8, redundant=32)
    for hardware in ("H100", "B200")
}
for hardware, estimate in estimates.items():
    print(f"{hardware}\n{estimate}\n")
