#!/bin/sh
# SPDX-License-Identifier: MIT
# program_test.sh FLASHKDA [quick]: what the program does with its arguments, its files and the world around it;
# quick: without the tables of bench, which take long under sanitizers.
# shellcheck source=tests/cli/says.sh
. "$(dirname "$0")/says.sh"

# ---- Help and information ------------------------------------------------------------------------
table 0 <<'ROWS'
Usage: flashkda \[OPTION | --help
Usage: flashkda \[OPTION | -h
Usage: flashkda \[OPTION | help
Usage: flashkda run      | help run
Usage: flashkda gen      | gen -h
Usage: flashkda bench    | bench --help
^flashkda [0-9]          | --version
^levels .* chosen:       | info
"levels": \[             | info --json
ROWS
table 2 <<'ROWS'
^flashkda: no subcommand: expected                  |
'sing' is no subcommand: expected run               | sing
'sing' is no subcommand: expected run               | help sing
unrecognized option '--loud'                        | --loud
^flashkda info: unexpected argument 'more'          | info more
ROWS
FLASH_KDA_CPU=sse says 2 'FLASH_KDA_CPU is sse' info

# ---- gen and run ---------------------------------------------------------------------------------
small='--tokens 50 --heads 2 --key-dim 16 --value-dim 8'
while IFS='|' read -r name arguments runs; do
    # shellcheck disable=SC2086 # words on purpose
    says 0 "^$name.safetensors: " gen "$name.safetensors" $small $arguments
    # shellcheck disable=SC2086 # words on purpose
    says 0 'within tolerance' run "$name.safetensors" --check --repeat 1 $runs
done <<'ROWS'
plain|--seed 3|--threads 2
strong|--regime strong --gate sigmoid --lower-bound -2 --dtype fp16|--backend cpu
none|--gate none --regime uniform --g -1.5 --dtype fp32|--decode
uniform|--regime uniform --batch 3 --initial-state|--decode
collinear|--regime near-collinear|--backend reference
grouped|--value-heads 4 --initial-state|--decode
many|--heads 9|
ROWS
says 0 'N3-T50-H2-K16-V8' gen packed.safetensors --lengths 30,0,20 --heads 2 --key-dim 16 --value-dim 8 --initial-state
says 0 'within tolerance' run packed.safetensors --check --decode
says 0 '3 packed sequences' run packed.safetensors
says 0 'T5000' gen long.safetensors --tokens 5000 --heads 1 --key-dim 4 --value-dim 4
says 0 '4096 tokens sampled' run long.safetensors --repeat 1
says 0 'captured' gen again.safetensors --captured plain.safetensors --tokens 70 --heads 3
says 0 '"passed": true' run again.safetensors --json --check
says 0 '"passed": null' run plain.safetensors --json -o result.safetensors
says 0 'written    result.safetensors' run plain.safetensors -o result.safetensors
says 0 'ok' run plain.safetensors --check
# gen makes no log decay above 0: another gate's file becomes one of gate none.
says 0 'T50' gen softplus.safetensors --tokens 50 --regime uniform --g 0.25
LC_ALL=C sed 's/"softplus"/"none"    /; s/"A_log"/"no_A_"/; s/"dt_bias"/"no_bias"/' softplus.safetensors >growing.safetensors
says 0 'a log decay is 0.25, above 0' run growing.safetensors
"$flashkda" gen one.safetensors --seed 5 --tokens 9 >said && "$flashkda" gen two.safetensors --seed 5 --tokens 9 >said
holds 'the same seed, the same bits' cmp one.safetensors two.safetensors
table 2 <<'ROWS'
no output file: flashkda gen OUT                              | gen
unexpected argument 'b': one output file                      | gen a b
--batch is '0', expected a whole number from 1                | gen a --batch 0
--tokens is '-1', expected a whole number from 0              | gen a --tokens -1
--heads is 'x', expected                                      | gen a --heads x
--value-heads is 3, expected a multiple of the 8 heads        | gen a --value-heads 3
--key-dim is '257', expected a whole number from 1 to 256     | gen a --key-dim 257
--value-dim is '0', expected                                  | gen a --value-dim 0
--lengths is '3,,4', expected whole numbers                   | gen a --lengths 3,,4
--lengths is '3x', expected whole numbers                     | gen a --lengths 3x
--lengths is '9999999999999999999', expected                  | gen a --lengths 9999999999999999999
--lengths is '9000000000000000000,9000000000000000000', exp   | gen a --lengths 9000000000000000000,9000000000000000000
--dtype is 'fp8', expected one of: bf16                       | gen a --dtype fp8
--gate is 'relu', expected one of: none, softplus, sigmoid    | gen a --gate relu
--regime is 'odd', expected one of: strong                    | gen a --regime odd
--lower-bound is '-6', expected a number from -5              | gen a --gate sigmoid --lower-bound -6
--lower-bound is 0, expected less                             | gen a --gate sigmoid --lower-bound 0
--g is 'nan', expected a number                               | gen a --regime uniform --g nan
--seed is '-1', expected                                      | gen a --seed -1
--lower-bound is of the sigmoid gate                          | gen a --gate none --lower-bound -3
--lower-bound is of the sigmoid gate                          | gen a --lower-bound -3
--g is of --regime uniform                                    | gen a --g -3
--lengths does not go with --tokens                           | gen a --lengths 3,4 --tokens 7
--lengths does not go with --batch                            | gen a --lengths 3,4 --batch 2
--captured goes with --batch, --tokens                        | gen a --captured plain.safetensors --dtype fp32
--regime captured has no inputs of its own                    | gen a --regime captured
out of memory for a case                                      | gen a --tokens 1073741824 --heads 1073741824
nowhere/a: cannot be written: No such file                    | gen nowhere/a --tokens 1
\.: cannot be replaced: not a regular file                    | gen . --tokens 1
absent: No such file                                          | gen a --captured absent
no input file: flashkda run IN                                | run
unexpected argument 'b': one input file                       | run a b
absent: No such file                                          | run absent
\.: not a regular file                                        | run .
--backend is 'gpu', expected one of: auto, reference          | run a --backend gpu
--threads is '0', expected a whole number from 1 to 1024      | run a --threads 0
--repeat is '0', expected                                     | run a --repeat 0
--threads is the CPU backend's                                | run plain.safetensors --backend reference --threads 2
--output is the input file, './plain.safetensors'             | run plain.safetensors -o ./plain.safetensors
--output - and --json both write to standard output           | run plain.safetensors -o - --json
nowhere/out: cannot be written                                | run plain.safetensors -o nowhere/out
expected one sequence with as many value heads                | gen a --captured grouped.safetensors
ROWS
holds 'the input is still there' "$flashkda" run plain.safetensors

# ---- bench ---------------------------------------------------------------------------------------
tiny='--tokens 40 --heads 2 --key-dim 16 --value-dim 8 --repeat 3'
while IFS='|' read -r pattern arguments; do
    # shellcheck disable=SC2086 # words on purpose
    says 0 "$pattern" bench $tiny $arguments
done <<'ROWS'
^T40-H2-K16-V8-softplus-slow .*generic|--level generic
generic .*$|--level all --out-dtype fp32
^T40-H2-K16-V8-softplus-slow-every32 .*|--backward --checkpoint-every 32
"commit": "abc"|--json --commit abc --threads 1
written|-o written.json --commit written --json
ROWS
"$flashkda" gen captured.safetensors --heads 2 --tokens 30 >said
says 0 '^T40-H2-softplus-captured' bench --captured captured.safetensors --tokens 40 --heads 2 --repeat 3
holds 'the JSON is written' grep -q '"tokens_per_second"' written.json
if [ "${2:-}" != quick ]; then
    says 0 '^N9-T512' bench --quick
    # Of packed sequences too the oracle may see fewer heads.
    says 0 '^N2-T4100' bench --lengths 2100,2000 --heads 2 --key-dim 256 --value-dim 256 --repeat 1
    says 0 '^H8-B2-T4-fp32, state each' bench --quick --decode --threads 2
    says 0 '"decode": "in place"' bench --quick --decode --json
fi
table 2 <<'ROWS'
--level is 'bogus', expected one of: all, generic             | bench --level bogus
--threads is '0', expected a whole number                     | bench --threads 0
--repeat is '1001', expected                                  | bench --repeat 1001
--checkpoint-every is 48, expected a multiple of 32           | bench --checkpoint-every 48
--out-dtype is 'int', expected one of                         | bench --out-dtype int
--backend is 'tpu', expected one of: cpu, cuda                | bench --backend tpu
--quick is a table of its own                                 | bench --quick --tokens 3
--decode is a table of its own                                | bench --decode --tokens 3
--level and --threads are the CPU backend's                   | bench --backend cuda --threads 3
--commit is kept in the JSON                                  | bench --commit abc
--output - would mix JSON with the table                      | bench -o -
unexpected argument 'more'                                    | bench more
nowhere/x.json: cannot be written                             | bench -o nowhere/x.json
absent: No such file                                          | bench --captured absent
ROWS
holds 'what could not be measured leaves nothing behind' test ! -e nowhere -a ! -e x.json

# ---- Streams -------------------------------------------------------------------------------------
"$flashkda" gen - --tokens 9 --heads 1 2>messages | "$flashkda" run - -o - 2>>messages >streamed.safetensors
"$flashkda" gen single.safetensors --tokens 9 --heads 1 >said
"$flashkda" run single.safetensors -o named.safetensors >said
holds 'streams carry what files hold' cmp streamed.safetensors named.safetensors
holds 'messages of streams go to standard error' grep -q '^ran on' messages
holds 'a big stream' sh -c "'$flashkda' gen - --tokens 2000 --heads 4 2>/dev/null | '$flashkda' run - --repeat 1"
for command in --help 'help run' info 'gen - --tokens 9' 'run single.safetensors -o -'; do
    # shellcheck disable=SC2086 # words on purpose
    "$flashkda" $command 2>said >/dev/full
    judge "flashkda $command >/dev/full" $? 2 'No space left on device'
done
odd=$(printf 'caf\351\033.safetensors')
cp single.safetensors "$odd"
says 0 '"file": "caf\\\\xe9\\\\x1b.safetensors"' run "$odd" --json
says 0 'file       caf\\xe9\\x1b.safetensors' run "$odd"
says 2 'run: caf\\xe9\\x1b: No such file' run "$(printf 'caf\351\033')"

# ---- Signals -------------------------------------------------------------------------------------
{
    "$flashkda" gen - --tokens 4096 --heads 8 2>/dev/null
    echo $? >status
} | head -c 100 >/dev/null
: >said
judge 'a pipe that is closed' "$(cat status)" 141 ''
while read -r signal expected; do
    env --default-signal="$signal" "$flashkda" bench --tokens 65536 --heads 8 -o killed.json >said 2>&1 &
    until ls killed.json.* >/dev/null 2>&1 || ! kill -0 $! 2>/dev/null; do sleep 0.02; done
    kill -s "$signal" $!
    wait $! 2>/dev/null
    status=$?
    : >said
    judge "$signal" $status "$expected" ''
    holds "$signal leaves no file behind" sh -c '! ls killed.json*'
done <<'ROWS'
INT 130
TERM 143
ROWS
finish
