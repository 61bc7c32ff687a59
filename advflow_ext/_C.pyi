WITH_CUDA: bool
DTYPES: dict[str, int]
STATS: tuple[str, ...]
SUMMARY: dict[str, int]
STEP_COLUMNS: int
LOSSES: dict[str, tuple[bool, int, list[int], int]]

def build_info() -> str: ...
def launch_count() -> int: ...
def reset_launch_count() -> None: ...
