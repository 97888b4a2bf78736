#!/bin/sh
# SPDX-License-Identifier: MIT
# files_test.sh FLASHKDA: files that are wrong, and results that are.
# shellcheck source=tests/cli/says.sh
. "$(dirname "$0")/says.sh"

# refuses PATTERN HEADER DATA
refuses() {
    file bad.safetensors "$2" "$3"
    says 2 "bad.safetensors: .*$1" run bad.safetensors
}

# ---- The container -------------------------------------------------------------------------------
printf 'abc' >bad.safetensors
says 2 'not a safetensors file: only 3 bytes' run bad.safetensors
printf '\377\377\377\377\377\0\0\0' >bad.safetensors
says 2 'a header of 1099511627775 bytes, at most' run bad.safetensors
printf '\100\0\0\0\0\0\0\0{}' >bad.safetensors
says 2 'truncated: a header of 64 bytes in a file of 10' run bad.safetensors
while IFS='|' read -r pattern header data; do
    refuses "$pattern" "$header" "$data"
done <<'ROWS'
not a safetensors file: its header does not begin|[]|
its header is no valid JSON|{"q":|
its header is no valid JSON: duplicate|{"q":1,"q":1}|
tensor 'q' is not described by a JSON object|{"q":1}|
tensor '.x1b.31mq' is not described|{"\u001b[31mq":1}|
tensor 'q' has an unknown dtype 'X9'|{"q":{"dtype":"X9","shape":[],"data_offsets":[0,0]}}|
tensor 'q' has no shape|{"q":{"dtype":"F32","shape":3,"data_offsets":[0,0]}}|
tensor 'q' has 9 dimensions, at most 8|{"q":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}|abcd
dimension 1 of the shape is not a whole number|{"q":{"dtype":"F32","shape":[1,-1],"data_offsets":[0,4]}}|abcd
data_offsets is not a pair|{"q":{"dtype":"F32","shape":[1],"data_offsets":[0]}}|abcd
data_offsets .0, 8. do not lie in the 4 bytes|{"q":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}|abcd
the product of its shape overflows|{"q":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}|abcd
its shape needs 8 bytes, its data_offsets give 4|{"q":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}|abcd
comes after a hole|{"q":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}|ab
overlaps that of another|{"q":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"k":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}|ab
1 bytes after the last tensor's data|{"q":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}|ab
__metadata__ is not a JSON object|{"__metadata__":3}|
metadata 'gate' is not a string|{"__metadata__":{"gate":3}}|
ROWS

# ---- The case ------------------------------------------------------------------------------------
# One token of one head of one channel, each tensor a number in fp32; MORE: tensors from byte 20 on, with a comma.
header() {
    printf '{"__metadata__":{%s}' "$1"
    offset=0
    for name in q k v g; do
        printf ',"%s":{"dtype":"F32","shape":[1,1,1],"data_offsets":[%d,%d]}' "$name" $offset $((offset + 4))
        offset=$((offset + 4))
    done
    printf ',"beta":{"dtype":"F32","shape":[1,1],"data_offsets":[16,20]}%s}' "${2:-}"
}
one='\0\0\200\077' zero='\0\0\0\0' nan='\0\0\300\177'
inputs=$one$one$one$zero$zero
given='"gate":"none","beta":"given","qk_norm":"false"'
while IFS='|' read -r pattern metadata more data; do
    refuses "$pattern" "$(header "$metadata" "$more")" "$inputs$data"
done <<'ROWS'
metadata does not say the gate||
metadata gate is 'relu', expected one of: none|"gate":"relu"|
metadata lower_bound is '-3', but the gate is none|"gate":"none","lower_bound":"-3"|
metadata lower_bound is 'low', expected a finite number|"gate":"sigmoid","lower_bound":"low"|
metadata scale is 'inf', expected a finite number|"gate":"none","scale":"inf"|
metadata beta is 'tanh', expected one of|"gate":"none","beta":"tanh"|
metadata state_layout is 'x', expected one of|"gate":"none","state_layout":"x"|
metadata qk_norm is 'no', expected one of: false, true|"gate":"none","qk_norm":"no"|
lower_bound|"gate":"sigmoid","lower_bound":"-7"|
tensor 'A_log' is I32, expected F32, F16 or BF16|"gate":"softplus"|,"A_log":{"dtype":"I32","shape":[1],"data_offsets":[20,24]}|abcd
tensor 'A_log' has 2 dimensions, expected 1|"gate":"softplus"|,"A_log":{"dtype":"F32","shape":[1,1],"data_offsets":[20,24]}|abcd
tensor 'cu_seqlens' is F32, expected I32 or I64|"gate":"none"|,"cu_seqlens":{"dtype":"F32","shape":[1],"data_offsets":[20,24]}|abcd
tensor 'cu_seqlens' is empty|"gate":"none"|,"cu_seqlens":{"dtype":"I32","shape":[0],"data_offsets":[20,20]}|
cu_seqlens|"gate":"none"|,"cu_seqlens":{"dtype":"I32","shape":[1],"data_offsets":[20,24]}|abcd
tensor 'o' does not have the shape|"gate":"none"|,"o":{"dtype":"F32","shape":[1,1,2],"data_offsets":[20,28]}|abcdefgh
tensor 'state' does not have the shape|"gate":"none"|,"state":{"dtype":"F32","shape":[1,2,1],"data_offsets":[20,28]}|abcdefgh
ROWS
refuses "tensor 'q' has 2 dimensions, expected" '{"q":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}' "$one"
refuses "has no tensor 'q'" '{"k":{"dtype":"F32","shape":[1,1,1],"data_offsets":[0,4]}}' "$one"

# ---- Results -------------------------------------------------------------------------------------
# The answer is beta v k q = 0, from no state.
answer=',"o":{"dtype":"F32","shape":[1,1,1],"data_offsets":[20,24]}'
file right.safetensors "$(header "$given" "$answer")" "$inputs$zero"
file wrong.safetensors "$(header "$given" "$answer")" "$inputs$one"
file spoilt.safetensors "$(header "$given")" "$one$one$nan$zero$one"
file scaled.safetensors "$(header "$given,\"scale\":\"0.5\",\"state_layout\":\"k_first\",\"regime\":\"own\"")" "$inputs"
says 0 'result     within tolerance' run right.safetensors --check
says 1 'result     NOT WITHIN TOLERANCE' run wrong.safetensors --check
says 1 '"passed": false' run wrong.safetensors --check --json
says 0 '2 values of the result are not finite' run spoilt.safetensors
says 1 'NOT WITHIN TOLERANCE' run spoilt.safetensors --check
says 0 'scale 0.5, state k_first' run scaled.safetensors -o out.safetensors
holds 'the result says how it was made' grep -q '"scale":"0.5","regime":"own","ran_on":"cpu: .*"made_by":"flashkda' out.safetensors
says 0 'never' run right.safetensors
finish
