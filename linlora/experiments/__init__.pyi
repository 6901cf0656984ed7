from .adapters import compare_adapters as compare_adapters
from .options import Options as Options
from .recipes import compare_recipe as compare_recipe
from .run import run as run
