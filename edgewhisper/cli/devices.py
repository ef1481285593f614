"""`edgewhisper devices`: list the known devices, clean one, or calibrate one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from edgewhisper.cli.options import Threads
from edgewhisper.cli.output import print_table, say

CONNECTIONS = {
    "local": "ready",
    "ssh": "--host USER@HOST",
    "adb": "adb, --serial S",
    "browser": "--browser",
}
"""Kind of device -> how to connect to it."""

Host = Annotated[
    str | None, Option(metavar="USER@HOST", help="SSH address of the device, as in bench")
]
Serial = Annotated[str | None, Option(help="serial number of the phone, as in bench")]

devices_app = typer.Typer()


@devices_app.callback(invoke_without_command=True)
def devices_cli(context: typer.Context) -> None:
    """List the known devices and how to connect to each.

    In --device, rpi is short for rpi4, and mobile for pixel.
    """
    if context.invoked_subcommand is not None:
        return
    from devices.device import load_profile, profile_names

    for profile in map(load_profile, profile_names()):
        say(f"{profile.name:12} {profile.kind:7} {CONNECTIONS[profile.kind]:20} {profile.model}")


@devices_app.command("clean")
def clean_cli(host: Host = None, serial: Serial = None) -> None:
    """Remove all files that bench copied to a device.

    These are artifacts, clips, numpy and onnxruntime.
    """
    if (host is None) == (serial is None):
        raise typer.BadParameter("give one device, with --host or with --serial")
    if serial is not None:
        from devices.adb import remove_all

        folder, freed = remove_all(serial)
    else:
        from devices.ssh import SshDevice

        with SshDevice(str(host)) as device:
            folder, freed = device.clean()
    say(f"removed {folder} from {host or serial}: {freed / 1e6:.1f} MB")


@devices_app.command("calibrate")
def calibrate_cli(
    device: Annotated[str, Option(help="name of a device (see `edgewhisper devices`)")] = "local",
    host: Host = None,
    serial: Serial = None,
    threads: Threads = None,
    precision: Annotated[
        str | None, Option(help="fp32, fp16, int8 or int4; default: the best one for the device")
    ] = None,
    results: Annotated[
        list[Path] | None,
        Option(
            help="correct the existing table with this result file of bench, without measuring; "
            "may be repeated"
        ),
    ] = None,
) -> None:
    """Measure the latency table of a device.

    The table has the times of single operators. `edgewhisper compress --target-latency` needs it.
    Results of bench in ./edgewhisper-runs with the same device, precision and number of threads
    correct the table.
    """
    from devices.device import Place, places
    from edgewhisper import pipeline

    place = Place(device)
    if not results:
        (place,) = places([device], [host] if host else [], [serial] if serial else [])
    rows, summary = pipeline.calibrate(place, precision, threads, results, say)
    print_table(rows)
    say(summary)
