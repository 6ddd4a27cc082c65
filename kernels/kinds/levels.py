"""Uniform levels: how many a code may have, the planes that hold it, and the steps that suit a
Gaussian."""

RAW = 65536  # levels of a 16-bit class
TRIT, SIXTEEN = 0, 16  # "widths" of ternary and of 16-bit planes
# levels → widths of the planes, low bits first
PLANE_WIDTHS: dict[int, tuple[int, ...]] = {
    0: (),
    2: (1,),
    3: (TRIT,),
    4: (2,),
    8: (2, 1),
    16: (4,),
    32: (4, 1),
    64: (4, 2),
    256: (4, 4),
    RAW: (SIXTEEN,),
}
# Step in standard deviations, and mean squared error at unit variance, of the best uniform
# quantiser with that many levels for a Gaussian source (J. Max, "Quantizing for minimum
# distortion", 1960; tests/kernels/test_formats.py recomputes them).
GAUSSIAN_STEP = {
    2: 1.5958,
    3: 1.2240,
    4: 0.9957,
    8: 0.5860,
    16: 0.3352,
    32: 0.1881,
    64: 0.1041,
    256: 0.03076,
}
GAUSSIAN_MSE = {
    0: 1.0, 2: 0.3634, 3: 0.1902, 4: 0.1188, 8: 0.03744, 16: 0.01154, 32: 0.003495, 64: 0.001041,
    256: 8.769e-5, RAW: 0.0,
}  # fmt: skip
