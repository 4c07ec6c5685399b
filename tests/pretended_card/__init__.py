"""A CUDA card that isn't there: what runs on it runs on a T4's device, memory and precision, by the CPU.

``python -m pytest -p tests.pretended_card.plugin tests/pretended_card``; other sessions collect nothing here.

memory.h, device.h, call.h, operators.cpp  in C++: counts bytes, refuses mixed devices, copies late
build    compiles them, once for each version of torch
pretend  install: torch believes in it, from before its import on
streams  torch.cuda's streams and events
plugin   for pytest
"""
