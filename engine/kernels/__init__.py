"""What is compiled: C++ for CPUs, Triton for cards."""
