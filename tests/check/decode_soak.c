#include "decode_families.h"
void decode_soak(struct check *check) { (void)check; }
