"""Links in an artifact: the cache of huggingface_hub is made of them."""

from pathlib import Path

SNAPSHOTS, BLOBS = "snapshots", "blobs"


def leads_out(path: Path) -> bool:
    """Return whether a file is a link to anything but a file of its own hub cache.

    There, MODEL/snapshots/REVISION/.../NAME is a link to MODEL/blobs/HASH.
    """
    if not path.is_symlink():
        return False
    model = next(
        (p.parent for p in (path.parent.resolve() / path.name).parents if p.name == SNAPSHOTS), None
    )
    return model is None or path.resolve().parent != (model / BLOBS).resolve()
