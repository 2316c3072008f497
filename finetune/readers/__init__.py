"""Readers of robot data: LeRobot v2 and v3, RLDS (TFDS), HDF5 (LIBERO, robomimic), and a plain folder."""

import re
from pathlib import Path

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?")


def open_reader(source: str, name: str | None = None):
    """The reader for a folder or file, recognised by what is in it.

    Args:
        source: a LeRobot dataset (`meta/info.json`), an RLDS version folder (`features.json`), an HDF5 file or a
            folder of them, a folder of `episode_*/episode.json`, or one of these on the Hub (see `download`).
        name: the dataset's name, hence its `unnorm_key`; default: the folder's.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path, name = download(str(source), name)
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


def download(source: str, name: str | None = None) -> tuple[Path, str | None]:
    """Where a dataset of the Hub lies in the local cache, and its name. What is there is not fetched again.

    Args:
        source: `lab/pick_cup`, `lab/pick_cup@v3.0` (branch, tag or commit), or a folder of a repository that holds
            several: `openvla/modified_libero_rlds/libero_spatial_no_noops/1.0.0`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    matched = _HUB_ID.fullmatch(source)
    if matched is None:
        raise FileNotFoundError(f"{source} does not exist: expected a dataset's folder, or an HDF5 file.")
    repository, folder, revision = matched[1], matched[2].strip("/"), matched[3]
    try:
        patterns = f"{folder}/*" if folder else None
        root = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{source} does not exist here: expected a dataset's folder, or an HDF5 file. Nor could the dataset "
            f"{repository} be fetched from the Hub: {error}"
        ) from error
    path = Path(root, folder)
    if not path.is_dir():
        raise FileNotFoundError(f"The dataset {repository} has no folder {folder}, or it has not been downloaded.")
    return path, name or (None if folder else repository.rpartition("/")[2])
