#!/usr/bin/env bash
# What only a GPU shows, in ten minutes: bash benchmarks/gpu.sh [cifar10, or a folder of images]
# Leaves tables, pictures and logs in runs/gpu; each part has its own time limit, and none stops the next one.
cd "$(dirname "$0")/.." || exit 1
missing=$(python -c "
from importlib.util import find_spec
needed = 'torch torchvision torchdiffeq einops tyro tqdm pytest safetensors scipy'.split()
print(*[name for name in needed if not find_spec(name)])")
if [ -n "$missing" ]; then
    echo "missing: $missing. pip install $missing; where there is no network, run elsewhere" \
         "\`pip install --target packages --no-deps $missing\`, copy the folder here, and export PYTHONPATH=packages"
    exit 2
fi
out=runs/gpu
mkdir -p $out
python -c "import torch, torchvision; print('torch', torch.__version__, 'torchvision', torchvision.__version__,
    torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')" | tee $out/machine.txt
common="--dataset ${1:-cifar10} --out-dir $out --no-use-wandb"
thousand="--no-overfit --max-steps 1000 --sample-every 1000 --compile off"

part() {  # name, seconds, command
    local name=$1 seconds=$2 began=$SECONDS
    shift 2
    timeout -k 10 "$seconds" "$@" > "$out/$name.txt" 2>&1
    echo "$name: status $?, $((SECONDS - began)) s: $*" | tee -a $out/machine.txt
}

part tests 80 python -m pytest -q -m cuda
part demo 60 python trainer.py $common --name demo --print-loss-every 100     # PSNR by step is in its metrics.jsonl
part speed 90 python benchmarks/speed.py --preset cifar10-sr --repeats 3 --sample-count 32 --out $out/speed.json
for method in interpolant sr3 i2sb edm udpm regression; do
    task=sr; [ $method = edm ] && task=generate
    part $method 35 python trainer.py $common $thousand --name $method --method $method --task $task
done
part eager 35 python trainer.py $common $thousand --name eager --no-graph
part evaluate 55 python evaluate.py $out/interpolant $out/i2sb $out/regression --count 1000 --output $out/evaluation
part long 70 python trainer.py $common --name long --no-overfit --max-steps 10000 --sample-every 5000   # compiled
tail -n 3 $out/demo/metrics.jsonl $out/*/metrics.jsonl
