"""Tiles of columns per item, and the blocks that products read."""

MMA_TILES = (16, 32, 64, 128)  # 16 is the least that a tensor core takes
VECTOR_TILES = (1, 2, 4, 8, 16)
# Columns of a row stored together, so that a one-row step reads one row's bytes.
BLOCK_COLUMNS = 16
assert all(tile % BLOCK_COLUMNS == 0 for tile in MMA_TILES), "a tile is whole blocks"


# Columns that a program multiplies at a time, as many as its registers hold.
PART_COLUMNS = 32
# Overhead of a part, in columns: a row's elements from L2 cost as much as one bfloat16 or two FP8 columns, and its
# partial sums are added.
COLUMNS_OF_A_PART = 2


def choose_tile(width: int, num_programs: int, candidates: tuple[int, ...], num_groups: int = 1) -> int:
    """Columns per item that minimize the busiest program's work; ties take the larger tile."""

    def busiest(tile: int) -> int:
        cost = tile + COLUMNS_OF_A_PART * ceil_div(tile, PART_COLUMNS)
        return ceil_div(num_groups * ceil_div(width, tile), num_programs) * cost

    return min(candidates, key=lambda tile: (busiest(tile), -tile))


def num_blocks(columns: int) -> int:
    return ceil_div(columns, BLOCK_COLUMNS)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(size: int) -> int:
    """The least power of two >= `size`."""
    return 1 << (size - 1).bit_length()
