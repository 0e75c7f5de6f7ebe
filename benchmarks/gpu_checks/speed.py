"""Speed, filled in below."""
from gpu_checks import Row, Settings
def stage_one(settings: Settings) -> list[Row]: return []
def stage_two(settings: Settings) -> list[Row]: return []
def photographs(settings: Settings) -> list[Row]: return []
