"""How columns are cut: into the tiles of items, and the blocks that products read."""

MMA_TILES = (16, 32, 64, 128)  # 16 is the least that a tensor core takes
VECTOR_TILES = (1, 2, 4, 8, 16)
# Columns of a row that lie together where products read them: a step of one row then reads one row's bytes.
BLOCK_COLUMNS = 16
assert all(tile % BLOCK_COLUMNS == 0 for tile in MMA_TILES), "a tile is whole blocks"


# Columns that a program multiplies at a time, for which it has the registers.
PART_COLUMNS = 32
# What a part takes besides its columns, in columns: a row's elements are read from the L2 cache, as many bytes as a
# column of bfloat16 or two of FP8, and the slices of its sums are added.
COLUMNS_OF_A_PART = 2


def choose_tile(width: int, num_programs: int, candidates: tuple[int, ...], num_groups: int = 1) -> int:
    """Columns of an item, such that the busiest program has the least to do; of equals the most columns an item."""

    def busiest(tile: int) -> int:
        cost = tile + COLUMNS_OF_A_PART * ceil_div(tile, PART_COLUMNS)
        return ceil_div(num_groups * ceil_div(width, tile), num_programs) * cost

    return min(candidates, key=lambda tile: (busiest(tile), -tile))


def num_blocks(columns: int) -> int:
    return ceil_div(columns, BLOCK_COLUMNS)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()
