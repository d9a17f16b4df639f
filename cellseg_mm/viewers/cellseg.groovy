/*
 * Finds the cells of the image that is open in QuPath (0.5 or later) and adds them as detections.
 *
 * Use: Automate > Script editor, open this file, set COMMAND and MODEL, Run. Select annotations
 * before to look inside these only. Everything runs on this computer; docs/qupath.md tells more,
 * also how corrected cells become training data.
 */
import static qupath.lib.scripting.QP.*
import qupath.lib.common.GeneralTools

// ---- what to set ----

// The command, as a list: ['cellseg'], or with its folder: ['C:/cells/.venv/Scripts/cellseg.exe'],
// or ['/home/me/cells/.venv/bin/python', '-m', 'cellseg_mm'].
List<String> COMMAND = ['cellseg']
// A model's name or file, or a config and its checkpoint: ['/models/my.cellseg'].
List<String> MODEL = ['he4']
// More options of "cellseg predict". QuPath's images have red and blue where they belong.
List<String> OPTIONS = ['--red-blue', 'normal']
// Remove the detections that are there (of the selected annotations) once there are new ones.
boolean REPLACE = false
// Hand over a copy of the image as it is shown: rotated, cropped, or not from this computer.
boolean COPY_IMAGE = false

// ---- the image, and where to look ----

def server = getCurrentServer()
if (server == null)
    throw new IllegalStateException('No image is open. Open one, then run the script again.')
String name = GeneralTools.getNameWithoutExtension(server.getMetadata().getName())
String fileName = name.replaceAll(/[^\p{L}\p{N}._-]+/, '_')
File folder = getProject() == null
    ? new File(System.getProperty('java.io.tmpdir'), 'cellseg')
    : new File(buildFilePath(PROJECT_BASE_DIR, 'cellseg'))
File out = new File(folder, fileName)
out.mkdirs()

def regions = getSelectedObjects().findAll { it.isAnnotation() && it.getROI() != null && it.getROI().isArea() }
def before = getDetectionObjects().findAll { cell ->
    regions.isEmpty() || regions.any {
        it.getROI().contains(cell.getROI().getCentroidX(), cell.getROI().getCentroidY())
    }
}
if (!before.isEmpty() && !REPLACE)
    throw new IllegalStateException("There are ${before.size()} detections already. Remove them, or set REPLACE = true.")

def files = server.getURIs().collect { GeneralTools.toPath(it) }.findAll { it != null }
String image
if (COPY_IMAGE || files.size() != 1) {
    image = new File(folder, fileName + '.ome.tif').getPath()
    println 'cellseg: writes a copy of the image to ' + image
    writeImage(server, image)
} else {
    image = files[0].toString()
}

// ---- the prediction ----

List<String> words = COMMAND + ['predict'] + MODEL + [image, '--out', out.getPath(), '--format', 'geojson'] + OPTIONS
if (!regions.isEmpty()) {
    String regionFile = new File(folder, fileName + '.regions.json').getPath()
    exportObjectsToGeoJson(regions, regionFile, 'FEATURE_COLLECTION')
    words += ['--tissue', regionFile]
}
def pixel = server.getPixelCalibration()
if (pixel.hasPixelSizeMicrons() && !OPTIONS.contains('--um-per-px'))
    words += ['--um-per-px', String.valueOf(pixel.getAveragedPixelSizeMicrons())]
println 'cellseg: ' + words.join(' ')
def process = new ProcessBuilder(words).redirectErrorStream(true).start()
String last = ''
try {
    process.getInputStream().eachLine('UTF-8') { line ->
        println line
        last = line.trim().isEmpty() ? last : line
    }
    int status = process.waitFor()
    if (status != 0)
        throw new IllegalStateException("cellseg ended with status ${status}: ${last}")
} finally {
    process.destroy()  // also where the script is stopped
}

// ---- the cells ----

def results = out.listFiles().findAll { it.getName().endsWith('.geojson') }
if (results.size() != 1)
    throw new IllegalStateException("Expected one .geojson in ${out}, found ${results.size()}. Remove old ones, and run again.")
if (!before.isEmpty())
    removeObjects(before, true)
int others = getDetectionObjects().size()
importObjectsFromFile(results[0].getPath())
fireHierarchyUpdate()
println "cellseg: ${getDetectionObjects().size() - others} cells added, ${before.size()} detections removed"

// When you have corrected the cells, this line writes them for "cellseg import_data geojson":
//   exportObjectsToGeoJson(getDetectionObjects(), buildFilePath(PROJECT_BASE_DIR, 'corrected', GeneralTools.getNameWithoutExtension(getCurrentServer().getMetadata().getName()) + '.geojson'), 'FEATURE_COLLECTION')
