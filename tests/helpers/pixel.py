"""Output of a Pixel 8's tools in the formats of Android 14; the values are invented."""

PROPERTIES = """[ro.build.version.release]: [14]
[ro.build.version.sdk]: [34]
[ro.product.cpu.abi]: [{abi}]
[ro.product.manufacturer]: [Google]
[ro.product.model]: [Pixel 8]
[ro.soc.manufacturer]: [Google]
[ro.soc.model]: [Tensor G3]
[ro.vendor.empty]: []
[sys.boot.reason.last]: [reboot,userrequested
second line]
"""

BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: {usb}
  Wireless powered: false
  Dock powered: false
  Max charging current: 500000
  Max charging voltage: 5000000
  Charge counter: 3201000
  status: 2
  health: 2
  present: true
  level: 87
  scale: 100
  voltage: 4205
  temperature: 283
  technology: Li-ion
"""

POWER = """POWER MANAGER (dumpsys power)

Power Manager State:
  mDirty=0x0
  mWakefulness=Awake
  mStayOn=false
Display Power: state=OFF
"""

THERMAL = """IsStatusOverride: false
ThermalEventListeners:
	callbacks: 2
	killed: false
	broadcasts count: -1
ThermalStatusListeners:
	callbacks: 3
Thermal Status: 1
Cached temperatures:
	Temperature{mValue=61.0, mType=0, mName=BIG, mStatus=0}
	Temperature{mValue=30.1, mType=3, mName=VIRTUAL-SKIN, mStatus=0}
HAL Ready: true
HAL connection:
	ThermalHAL AIDL 1  connected: yes
Current temperatures from HAL:
	Temperature{mValue=47.2, mType=0, mName=BIG, mStatus=0}
	Temperature{mValue=44.0, mType=0, mName=LITTLE, mStatus=0}
	Temperature{mValue=NaN, mType=0, mName=MID, mStatus=0}
	Temperature{mValue=39.5, mType=1, mName=G3D, mStatus=0}
	Temperature{mValue=28.3, mType=2, mName=battery, mStatus=0}
Current cooling devices from HAL:
	CoolingDevice{mValue=0, mType=2, mName=thermal-cpufreq-0}
Temperature static thresholds from HAL:
	TemperatureThreshold{mType=0, mName=BIG, mHotThrottlingThresholds=[NaN, 95.0]}
"""


def tools(abi: str, usb: str = "true") -> dict[str, str]:
    """Return scripts that print it: name -> the text after the script's first line."""
    dumps = {"battery": BATTERY.format(usb=usb), "power": POWER, "thermalservice": THERMAL}
    cases = "".join(f"{name}) cat <<'END'\n{text}END\n;;\n" for name, text in dumps.items())
    listed = f"cat <<'END'\n{PROPERTIES.format(abi=abi)}END\n"
    return {
        "getprop": f'[ "$1" = ro.product.cpu.abi ] && echo {abi} && exit\n{listed}',
        "dumpsys": f'case "$1" in\n{cases}esac\n',
    }


def cores(*highest_khz: int) -> dict[str, str]:
    """Return files of /sys: name -> content."""
    found = {f"devices/system/cpu/{name}": "0-1\n" for name in ("possible", "present")}
    for core, khz in enumerate(highest_khz):
        clock = f"devices/system/cpu/cpu{core}/cpufreq"
        found[f"{clock}/cpuinfo_max_freq"] = f"{khz}\n"
        found[f"{clock}/scaling_cur_freq"] = f"{khz // 2}\n"
    return found
