// The C functions that make the simulated driver refuse tensor maps, for binding.py.
#include <simt/tensor_maps.h>

extern "C" void simt_refuse_tensor_maps(int refuse) { simt::refuse_tensor_maps(refuse != 0); }

extern "C" void simt_fail_encoding(int fail) { simt::fail_encoding(fail != 0); }
