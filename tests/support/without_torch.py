"""Runs a script of Python where nothing of torch and OpenMMLab can be imported."""

WITHOUT_TORCH = """
import runpy, sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet'):
            raise ImportError(f'{name}: is not to be imported here')
sys.meta_path.insert(0, Without())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
