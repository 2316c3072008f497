"""Readers of robot data: LeRobot v2 and v3, RLDS (TFDS), HDF5 (LIBERO, robomimic), and a plain folder."""

from pathlib import Path


def open_reader(source: str, name: str | None = None):
    """The reader for a folder or file, recognised by what is in it.

    Args:
        source: a LeRobot dataset (`meta/info.json`), an RLDS version folder (`features.json`), an HDF5 file or a
            folder of them, or a folder of `episode_*/episode.json`.
        name: the dataset's name, hence its `unnorm_key`; default: the folder's.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{source} does not exist: expected a dataset's folder, or an HDF5 file.")
    if (path / "meta" / "info.json").exists():
        from openvla.finetune.readers.lerobot import LeRobotReader

        return LeRobotReader(path, name)
    if (path / "features.json").exists():
        from openvla.finetune.readers.rlds import RLDSReader

        return RLDSReader(path, name)
    if path.suffix in (".hdf5", ".h5") or any(path.glob("*.hdf5")) or any(path.glob("*.h5")):
        from openvla.finetune.readers.hdf5 import HDF5Reader

        return HDF5Reader(path, name)
    if any(path.glob("episode_*/episode.json")):
        from openvla.finetune.readers.folder import FolderReader

        return FolderReader(path, name)
    versions = sorted(folder.parent.name for folder in path.glob("*/features.json"))
    hint = f" It holds RLDS versions {versions}: name one of them." if versions else ""
    raise ValueError(
        f"{source} is none of: LeRobot (meta/info.json), RLDS (features.json), HDF5 (*.hdf5), a plain folder "
        f"(episode_*/episode.json).{hint}"
    )
