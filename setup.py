"""What setup.cfg cannot say: kernels in C. Without a compiler the package is complete, and slower with many particles."""

from setuptools import Extension, setup

setup(ext_modules=[Extension(
    "pyro_seq.engine._native", ["pyro_seq/engine/native.c"], optional=True,
    extra_compile_args=["-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"])])
