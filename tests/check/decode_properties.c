#include "decode_families.h"
void decode_properties(struct check *check) { (void)check; }
