def run(args: list[str], level: int) -> int:
    return 0
