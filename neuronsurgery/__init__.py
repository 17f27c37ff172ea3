"""Neural-network surgery: find units that stopped learning, and make them learn again without changing the output.

`from neuronsurgery import surgery` or `import neuronsurgery as surgery`: both offer the same names. Importing this
package imports no framework.
"""

from neuronsurgery import surgery
from neuronsurgery.surgery import *  # noqa: F403
from neuronsurgery.surgery import __all__ as _names

__all__ = [*_names, "surgery"]
