"""The CPU's fast kernels in C++, compiled once per machine; `kernels/cpu` does the same in torch where that fails."""
