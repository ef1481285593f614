"""The files of a simulated Raspberry Pi, below a folder instead of /."""

from __future__ import annotations

from pathlib import Path

PI = {
    "proc/loadavg": "0.42 0.30 0.20 1/99 1234\n",
    "sys/class/thermal/thermal_zone0/temp": "48312\n",
    "sys/class/thermal/thermal_zone1/temp": "-274000\n",
    "sys/class/power_supply/AC/type": "Mains\n",
    **{
        f"sys/devices/system/cpu/cpu{core}/cpufreq/{name}": text
        for core in range(4)
        for name, text in {
            "scaling_cur_freq": f"{1_500_000 + core}\n",
            "scaling_governor": "ondemand\n",
            "scaling_available_governors": "ondemand performance\n",
            "cpuinfo_max_freq": "1800000\n" if core < 3 else "2400000\n",
        }.items()
    },
}


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root
