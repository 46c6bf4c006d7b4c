"""What a worker does in C++ between its steps, because numpy would need many small calls for it.

Everything here has its definition in Python, beside the module that calls it, which serves where there is no compiler.
"""
