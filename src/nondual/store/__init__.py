"""What is kept on this machine between runs, and how it gets there.

    cache          the cache folder: compiled code, weights, texts
    package        a pinned package: fetched once, every file checked by its hash when it is read
    download       its archive, downloaded so that an interrupted download can be resumed
    origins        the kinds of package: a wheel, a tarball of npm, a Debian package
    sources        the indexes and folders of pip, asked for a wheel
    pip_settings   which ones they are
    npm            the registry of npm, asked for a tarball
    debian         the mirrors of Debian
    archives       files read out of an archive, in memory
    partial_file   the file that the download grows in, held by one process at a time
    progress       a progress bar on a terminal
    command        fetch packages, or say where they are, from the command line
    errors         what can go wrong, in sentences

`nondual.data` takes its texts and pictures from here, and `nondual.pretrained` its weights. Nothing here needs torch.
"""

from nondual.store.archives import members
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
    "members",
    "progress_bar",
    "read",
    "status",
]
