"""Pages that go from one format to another by the kernel."""

from kvfold.kernels.gpu.encode import lower_jobs, lower_pages
from kvfold.kernels.gpu.records import FormatChange


def lower(sources, pages, old, new, **shape):
    """Pages at addresses int64 [n] into pages at others, of one layer and one step down; `shape`:
    num_kv_heads and page_tokens."""
    work = [FormatChange(sources.tolist(), pages.tolist(), old, new)]
    for jobs in lower_jobs(work, **shape, device=pages.device):
        lower_pages(jobs, **shape)
