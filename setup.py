"""What setup.cfg cannot say: kernels in C++. Without a compiler the package is complete, and slower with many particles."""

from setuptools import Extension, setup

setup(ext_modules=[Extension(
    "pyro_seq.engine._native", ["pyro_seq/engine/native.cpp"], optional=True,
    extra_compile_args=["-O3", "-ffp-contract=fast", "-fno-math-errno", "-std=c++17", "-Wno-psabi"])])
