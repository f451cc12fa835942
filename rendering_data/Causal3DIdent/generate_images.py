"""Render the images of Causal3DIdent with Blender's Cycles, from their latents.

    make blender                                                           # Blender as a Python package, once
    .venv-blender/bin/python rendering_data/Causal3DIdent/generate_images.py --output-folder data/Causal3DIDent
    blender --background --python rendering_data/Causal3DIdent/generate_images.py -- --output-folder data/Causal3DIDent

    ... --assets multimodal3dident/assets         # the real shapes, of a clone of Multimodal3DIdent; else stand-ins
    ... --device optix                            # on a GPU
    ... --n-batches 50 --batch-index 7            # the eighth fiftieth of the images: for a job array
    ... --plain                                   # the plain way, without what makes it fast

Reads latents_image.csv, which generate_latents.py wrote, and writes images/000000.png … and images.json, which says what
they were rendered from. Images appear whole or not at all, and those already there are kept: a run that was stopped goes on
with the same command, and an image does not depend on what was rendered before it.

How an image costs less than with --plain. The scene is built once, and an image moves and colours objects without touching
meshes or shaders. Every mesh has a second, parked user, so that Cycles keeps it and its BVH as an instance when it moves.
Light does not bounce, so that a picture is the sum of one picture for each lamp: rendered one by one, they lack the noise of
drawing at random, for every sample, the lamp that lights it, which is most of the noise at the object's edges. Of each lamp's
picture only the box is rendered that holds the object and its shadow, for the spotlight the object and the pool of light:
beyond it is empty ground, a linear function of its colour that is rendered once for each lamp and height of the ground.
Enough samples are not denoised: the denoiser takes time, and its bias is as large as their noise. A process a core, of one
thread each, runs side by side what does not scale with threads.
"""

import colorsys
import contextlib
import datetime
import hashlib
import importlib.util
import json
import math
import os
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from reading.causal3dident import CAUSAL_IMAGE, SHAPES, image_files, latents_digest, read_latents
from running.command_line import InputError, Parser, integer, run_script
from running.cores import usable_cores
from running.files import write_json

STANDINS = ("ring", "cone", "coil", "star", "jack", "arch", "monkey")  # for SHAPES
# Boxes that stand-ins are made of: (size, centre) along x, y and z.
BOXES = {
    "jack": [((2.0, 0.36, 0.36), (0, 0, 0)), ((0.36, 1.6, 0.36), (0, 0, 0)), ((0.36, 0.36, 1.2), (0, 0, 0))],
    "arch": [
        ((1.8, 0.6, 0.5), (0, 0, 0.75)),
        ((0.5, 0.6, 1.5), (-0.65, 0, -0.25)),
        ((0.5, 0.6, 1.5), (0.65, 0, -0.25)),
    ],
}
BASE_SCENE, RUBBER = "scenes/base_scene_equal_xyz.blend", "materials/Rubber.blend"  # of the assets
OBJECT_SCALE, GROUND_SIZE = 1.5, 1500.0
SPOT_WATTS, SPOT_CONE, SPOT_BLEND, SPOT_RADIUS = 3000.0, math.radians(35), 0.1, 0.5
STANDIN_SIZE = 2.8  # largest dimension of a stand-in before it is scaled; the teapot's is 2.96, the cow's 2.70
PARKED = (0.0, 0.0, -1e4)  # below the ground: seen by nothing, shading nothing
GROUND_SAMPLES = 16  # smooth and without shadows, it has hardly any noise
BOX_MARGIN = 2  # pixels around what is computed: the pixel filter reaches 0.75 pixels
DENOISED_BELOW = 64  # samples: from here on the denoiser gains at most 0.3 dB, for a quarter of the time
PROGRESS_SECONDS = 10
OLDEST_BLENDER = (4, 2)
STALE_SECONDS = 24 * 3600  # age of an unfinished image that no process works on any more


# --------------------------------------------------------------------------------------------------------------
# the scene, in a process that has Blender


def clear_scene(bpy):
    """A scene with the camera and the two lamps of the base scene, and nothing else; returns the material's node group."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    camera = bpy.data.objects.new("Camera", bpy.data.cameras.new("Camera"))
    camera.data.lens, camera.data.sensor_width = 35.0, 50.0
    camera.location = (8.0, 0.0, 8.0)
    area = bpy.data.objects.new("LightStatic", bpy.data.lights.new("LightStatic", "AREA"))
    area.data.energy, area.data.size, area.location = 39.27, 1.0, (0.0, 0.0, 7.0)
    sun = bpy.data.objects.new("LightDynamic", bpy.data.lights.new("LightDynamic", "SUN"))
    sun.data.energy, sun.data.angle = 0.5, 0.2
    camera.rotation_euler = (-camera.location).to_track_quat("-Z", "Y").to_euler()
    for item in (camera, area, sun):
        scene.collection.objects.link(item)
    scene.camera = camera
    group = bpy.data.node_groups.new("Rubber", "ShaderNodeTree")
    group.interface.new_socket("Shader", in_out="OUTPUT", socket_type="NodeSocketShader")
    group.interface.new_socket("Color", in_out="INPUT", socket_type="NodeSocketColor")
    inputs, outputs = group.nodes.new("NodeGroupInput"), group.nodes.new("NodeGroupOutput")
    kinds = ("BsdfDiffuse", "BsdfAnisotropic", "Fresnel", "MixShader")
    diffuse, gloss, fresnel, mix = (group.nodes.new(f"ShaderNode{kind}") for kind in kinds)
    gloss.inputs["Roughness"].default_value, fresnel.inputs["IOR"].default_value = 0.6, 1.2
    group.links.new(inputs.outputs["Color"], diffuse.inputs["Color"])
    for place, source in enumerate((fresnel, diffuse, gloss)):
        group.links.new(source.outputs[0], mix.inputs[place])
    group.links.new(mix.outputs[0], outputs.inputs["Shader"])
    return group


def bad_asset(file, what):
    """InputError about a file of the assets."""
    return InputError(f"{file} {what}; take it from a fresh clone of Multimodal3DIdent")


def load_base_scene(bpy, assets):
    """The base scene of the assets without its ground; returns the node group of the material Rubber."""
    file = assets / BASE_SCENE
    try:
        bpy.ops.wm.open_mainfile(filepath=str(file))
    except RuntimeError as error:
        raise bad_asset(file, f"is damaged ({error})") from None
    if "Ground" not in bpy.data.objects or bpy.context.scene.camera is None:
        raise bad_asset(file, "has no Ground or no camera")
    bpy.data.objects.remove(bpy.data.objects["Ground"])
    return append(bpy, assets / RUBBER, "node_groups", "Rubber")


def append(bpy, file, kind, name):
    """Data block `name` of a .blend file; InputError if it is not in there."""
    try:
        with bpy.data.libraries.load(str(file)) as (source, target):
            if name in getattr(source, kind):
                setattr(target, kind, [name])
    except OSError as error:
        raise bad_asset(file, f"is damaged ({error})") from None
    if not getattr(target, kind):
        raise bad_asset(file, f"holds no {name}")
    return getattr(target, kind)[0]


def standin_mesh(bpy, name):
    """Mesh of a stand-in shape, its largest dimension STANDIN_SIZE, its bounding box around the origin."""
    import bmesh
    from mathutils import Matrix, Vector

    shape = bmesh.new()

    def tube(path, radius, sides, closed):
        """Circle of `sides` corners swept along points that wind around the z axis."""
        rings = []
        for point in path:
            outwards = Vector((point.x, point.y, 0.0)).normalized()
            angles = [2 * math.pi * k / sides for k in range(sides)]
            corners = [point + radius * (math.cos(a) * outwards + math.sin(a) * Vector((0, 0, 1))) for a in angles]
            rings.append([shape.verts.new(corner) for corner in corners])
        for k in range(len(rings) if closed else len(rings) - 1):
            here, there = rings[k], rings[(k + 1) % len(rings)]
            for j in range(sides):
                shape.faces.new((here[j], there[j], there[(j + 1) % sides], here[(j + 1) % sides]))
        if not closed:
            shape.faces.new(rings[0])
            shape.faces.new(reversed(rings[-1]))

    def turn(turns, points, rise):
        angles = [2 * math.pi * turns * k / points for k in range(points)]
        return [Vector((math.cos(a), math.sin(a), rise * (a / (2 * math.pi) - turns / 2))) for a in angles]

    if name == "ring":
        tube(turn(1, 48, 0.0), 0.38, 20, closed=True)
    elif name == "cone":
        bmesh.ops.create_cone(shape, cap_ends=True, segments=48, radius1=1.0, radius2=0.0, depth=2.2)
    elif name == "coil":
        tube(turn(2.5, 100, 0.9), 0.22, 14, closed=False)
    elif name == "star":
        for z in (-0.3, 0.3):
            for k in range(10):
                radius, angle = (1.0 if k % 2 == 0 else 0.42), math.pi * k / 5
                shape.verts.new((radius * math.cos(angle), radius * math.sin(angle), z))
        shape.verts.ensure_lookup_table()
        bottom, top = shape.verts[:10], shape.verts[10:]
        shape.faces.new(reversed(bottom))
        shape.faces.new(top)
        for k in range(10):
            shape.faces.new((bottom[k], bottom[(k + 1) % 10], top[(k + 1) % 10], top[k]))
    elif name == "monkey":
        bmesh.ops.create_monkey(shape)
        bmesh.ops.subdivide_edges(shape, edges=shape.edges[:], cuts=1, smooth=1.0, use_grid_fill=True)
    for size, centre in BOXES.get(name, ()):
        matrix = Matrix.Translation(centre) @ Matrix.Diagonal((*size, 1.0))
        bmesh.ops.create_cube(shape, size=1.0, matrix=matrix)
    low, high = ([pick(vertex.co[axis] for vertex in shape.verts) for axis in range(3)] for pick in (min, max))
    centre = (Vector(low) + Vector(high)) / 2
    factor = STANDIN_SIZE / max(b - a for a, b in zip(low, high, strict=True))
    for vertex in shape.verts:
        vertex.co = (vertex.co - centre) * factor
    bmesh.ops.recalc_face_normals(shape, faces=shape.faces[:])
    mesh = bpy.data.meshes.new(name)
    shape.to_mesh(mesh)
    shape.free()
    if name in ("ring", "coil", "monkey"):
        mesh.shade_smooth()
    return mesh


def rubber_material(bpy, name, group):
    """Material of the node group Rubber whose colour is the object's, so that a new colour leaves the shader alone."""
    material = bpy.data.materials.new(name)
    material.use_nodes = True
    tree = material.node_tree
    tree.nodes.clear()
    rubber, surface, color = (tree.nodes.new(f"ShaderNode{kind}") for kind in ("Group", "OutputMaterial", "ObjectInfo"))
    rubber.node_tree = group
    tree.links.new(color.outputs["Color"], rubber.inputs["Color"])
    tree.links.new(rubber.outputs["Shader"], surface.inputs["Surface"])
    return material


def build_scene(bpy, settings):
    """Scene of `settings` (a dict, see `main`): returns {object_shape: (object, its largest dimension)}, ground, spot."""
    assets = settings["assets"] and Path(settings["assets"])
    group = load_base_scene(bpy, assets) if assets else clear_scene(bpy)
    link = bpy.context.scene.collection.objects.link
    material = rubber_material(bpy, "Object", group)
    shapes = {}
    for number in settings["shapes"]:
        if assets:
            file = assets / shape_file(number)
            shape = append(bpy, file, "objects", file.stem)
        else:
            shape = bpy.data.objects.new(STANDINS[number], standin_mesh(bpy, STANDINS[number]))
        shape.data.materials.clear()
        shape.data.materials.append(material)
        shape.scale = [OBJECT_SCALE * factor for factor in shape.scale]
        shape.rotation_mode = "XYZ"
        shape.location = PARKED
        corners = [[corner[axis] for corner in shape.bound_box] for axis in range(3)]
        size = max((max(c) - min(c)) * s for c, s in zip(corners, shape.scale, strict=True))
        link(shape)
        link(shape.copy())  # a second user of the mesh: without it, Cycles rebuilds the BVH of a mesh that moves
        shapes[number] = shape, size
    half = GROUND_SIZE / 2
    plane = bpy.data.meshes.new("Plane")
    plane.from_pydata([(-half, -half, 0), (half, -half, 0), (half, half, 0), (-half, half, 0)], [], [(0, 1, 2, 3)])
    plane.materials.append(rubber_material(bpy, "Plane", group))
    ground = bpy.data.objects.new("Plane", plane)
    spot = bpy.data.objects.new("Spot", bpy.data.lights.new("Spot", "SPOT"))
    spot.data.energy, spot.data.spot_size, spot.data.spot_blend = SPOT_WATTS, SPOT_CONE, SPOT_BLEND
    spot.data.shadow_soft_size = SPOT_RADIUS
    link(ground)
    link(spot)
    set_up_cycles(bpy, settings)
    return shapes, ground, spot


def set_up_cycles(bpy, settings):
    """Set the scene's renderer: no bounces, sampling and denoising, device and threads."""
    scene = bpy.context.scene
    render, cycles = scene.render, scene.cycles
    render.engine = "CYCLES"
    render.resolution_x = render.resolution_y = settings["size"]
    render.resolution_percentage = 100
    render.image_settings.file_format, render.image_settings.color_mode = "PNG", "RGB"
    render.image_settings.color_depth = "8"
    render.use_compositing = render.use_sequencer = render.use_file_extension = False
    render.dither_intensity = 0.0
    scene.view_settings.view_transform = "Standard"
    scene.world = scene.world or bpy.data.worlds.new("World")
    scene.world.use_nodes = True
    for node in scene.world.node_tree.nodes:
        if node.bl_idname == "ShaderNodeBackground":
            node.inputs["Strength"].default_value = 0.0
    for name in ("max", "diffuse", "glossy", "transmission", "volume", "transparent_max"):
        setattr(cycles, f"{name}_bounces", 0)
    cycles.samples = settings["samples"]
    cycles.use_denoising = settings["denoise"] and (settings["plain"] or settings["samples"] < DENOISED_BELOW)
    if cycles.use_denoising:
        try:
            cycles.denoiser = "OPENIMAGEDENOISE"
        except TypeError:
            raise InputError(
                f"this Blender was built without OpenImageDenoise, without which --plain and fewer than {DENOISED_BELOW} samples "
                f"do not work; use --samples {DENOISED_BELOW} or more, or Blender's own build, or `make blender`"
            ) from None
        cycles.denoising_input_passes = "RGB_ALBEDO_NORMAL"
        # Albedo and normals of a scene without textures are free of noise but for edges: nothing to filter beforehand.
        cycles.denoising_prefilter = "ACCURATE" if settings["plain"] else "NONE"
        cycles.denoising_quality = "HIGH" if settings["plain"] else "BALANCED"
    cycles.use_adaptive_sampling = False  # more noise at equal time: it ends a pixel's samples amid a Sobol block
    cycles.use_light_tree = False
    if not settings["plain"]:
        cycles.sampling_pattern = "TABULATED_SOBOL"  # the automatic one depends on what was rendered before
    cycles.use_auto_tile = False
    render.threads_mode, render.threads = "FIXED", settings["threads"]
    render.use_persistent_data = not settings["plain"]
    if settings["device"] != "cpu":
        preferences = bpy.context.preferences.addons["cycles"].preferences
        kind = settings["device"].upper()
        try:
            preferences.compute_device_type = kind
        except TypeError:
            raise InputError(f"this Blender was built without {kind}; use --device cpu") from None
        preferences.refresh_devices()
        for device in preferences.devices:
            device.use = device.type == kind
        if not any(device.use for device in preferences.devices):
            raise InputError(f"Cycles finds no {kind} device; check the driver, or use --device cpu")
        cycles.device = "GPU"
        cycles.denoising_use_gpu = True


def hue(latent, protocol):
    """Hue of the ground or the spotlight: (latent − ½)/2, between −¼ and ¼.

    protocol: paper wraps hues below 0 into [0, 1], code leaves them to colorsys, which gives them one component above or below
    the others' range (Blender takes what is below 0 for 0). The published data set's mean and standard deviation over pixels
    are nearer to the latter's: 0.433 0.269 0.284, 0.120 0.146 0.108; unwrapped, 48 images of the real base scene have
    0.432 0.284 0.276, 0.114 0.124 0.061, wrapped 0.432 0.320 0.298, 0.114 0.089 0.078.
    """
    unwrapped = (latent - 0.5) / 2
    return unwrapped % 1.0 if protocol == "paper" else unwrapped


def set_latents(shapes, ground, spot, latents, protocol="code"):
    """Move and colour what the latents of one image say; the object of the last image is parked."""
    from mathutils import Euler, Vector

    shape, size = shapes[latents["object_shape"]]
    for other, _ in shapes.values():
        if other is not shape and tuple(other.location) != PARKED:
            other.location = PARKED
    shape.location = (3.0 * latents["object_ypos"] - 3.0, 3.0 * latents["object_xpos"] - 3.0, 0.0)
    shape.rotation_euler = Euler(
        math.pi * latents[f"object_{name}rot"] - math.pi / 2 for name in ("alpha", "beta", "gamma")
    )
    shape.color = (*colorsys.hsv_to_rgb(latents["object_color"], 1.0, 1.0), 1.0)
    ground.location.z = -size
    ground.color = (*colorsys.hsv_to_rgb(hue(latents["background_color"], protocol), 0.6, 1.0), 1.0)
    phi = math.pi * latents["spotlight_pos"] - math.pi / 2
    spot.location = (4.0 * math.sin(phi), 4.0 * math.cos(phi), 6.0 + size)
    spot.rotation_euler = (shape.location - Vector(spot.location)).to_track_quat("-Z", "Y").to_euler()
    spot.data.color = colorsys.hsv_to_rgb(hue(latents["spotlight_color"], protocol), 0.8, 1.0)


def hull(bpy, shape):
    """(V, 3) corners of the convex hull of an object's mesh, in its own coordinates."""
    import bmesh

    solid = bmesh.new()
    bpy.context.view_layer.update()
    solid.from_object(shape, bpy.context.evaluated_depsgraph_get())
    found = bmesh.ops.convex_hull(solid, input=solid.verts)["geom"]
    corners = np.array([vertex.co[:] for vertex in found if isinstance(vertex, bmesh.types.BMVert)])
    solid.free()
    return corners


def cone(half, count=32):
    """(count, 3) rays whose hull holds all rays from −z by at most the angle `half`, in radians."""
    angles, radius = 2 * np.pi * np.arange(count) / count, math.tan(half) / math.cos(math.pi / count)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles), np.full(count, -1.0)], 1)


def shadow(corners, lamp, height):
    """(M, 3) points of the plane z = height whose hull contains the shadow of a convex body; None if it has no bounds.

    corners: (V, 3) of the body, in the world's coordinates as all here; lamp: a lamp object.
    """
    matrix, data = np.array(lamp.matrix_world), lamp.data
    if data.type == "SUN":
        rays = np.repeat((cone(data.angle / 2) @ matrix[:3, :3].T)[None], len(corners), 0)
    else:
        if data.type == "AREA":
            wide = (data.size, data.size_y if data.shape in ("RECTANGLE", "ELLIPSE") else data.size)
            source = np.array([(x * wide[0] / 2, y * wide[1] / 2, 0) for x in (-1, 1) for y in (-1, 1)])
        else:  # POINT and SPOT: a ball
            source = data.shadow_soft_size * np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
        rays = corners[:, None] - (source @ matrix[:3, :3].T + matrix[:3, 3])
    if rays[..., 2].max() > -1e-6:
        return None
    return (corners[:, None] + rays * ((height - corners[:, None, 2]) / rays[..., 2])[..., None]).reshape(-1, 3)


def pool(spot, height):
    """(M, 3) points of the plane z = height whose hull contains all that a spotlight lights; None if it has no bounds.

    The lamp is a ball, whose points all have the cone: they lie in that cone moved back by radius / sin(half its angle).
    """
    matrix, half = np.array(spot.matrix_world), spot.data.spot_size / 2
    apex = matrix[:3, 3] + matrix[:3, 2] * spot.data.shadow_soft_size / math.sin(half)
    rays = cone(half) @ matrix[:3, :3].T
    if rays[:, 2].max() > -1e-6:
        return None
    return apex + rays * ((height - apex[2]) / rays[:, 2:])


def pixel_box(bpy, points):
    """(left, right, bottom, top): the pixels that the hull of (M, 3) points may touch; all of them if it has no bounds.

    points: None for no bounds. Points behind the camera have none either.
    """
    scene = bpy.context.scene
    size, camera = scene.render.resolution_x, scene.camera
    whole = 0, size, 0, size
    if points is None:
        return whole
    view = (
        camera.calc_matrix_camera(bpy.context.evaluated_depsgraph_get(), x=size, y=size)
        @ camera.matrix_world.inverted()
    )
    seen = np.pad(points, ((0, 0), (0, 1)), constant_values=1.0) @ np.array(view).T
    if seen[:, 3].min() < 1e-3:
        return whole
    places = (seen[:, :2] / seen[:, 3:] + 1) / 2 * size
    low = np.clip(np.floor(places.min(0)).astype(int) - BOX_MARGIN, 0, size - 1)
    high = np.clip(np.ceil(places.max(0)).astype(int) + BOX_MARGIN, low + 1, size)
    return int(low[0]), int(high[0]), int(low[1]), int(high[1])


def radiance(bpy, file):
    """(image, (H, W, 4) float32): the scene rendered, linear, its rows from the bottom; by way of `file`, which is left."""
    render = bpy.context.scene.render
    render.filepath = file
    render.image_settings.file_format, render.image_settings.color_depth = "OPEN_EXR", "32"
    render.image_settings.exr_codec = "NONE"
    bpy.ops.render.render(write_still=True)
    image = bpy.data.images.load(file)
    pixels = np.empty(4 * image.size[0] * image.size[1], np.float32)
    image.pixels.foreach_get(pixels)
    return image, pixels.reshape(image.size[1], image.size[0], 4)


class LampByLamp:
    """Renders pictures as the sum of one for each lamp, each of them only where it is not empty ground.

    scene: what `build_scene` made of the settings. Half of a pixel's samples are the spotlight's, the rest the other lamps'.
    """

    def __init__(self, bpy, scene, settings):
        self.bpy, self.scene, self.protocol, self.kept = bpy, scene, settings["protocol"], {}
        spot = scene[2]
        others = [item for item in bpy.context.scene.objects if item.type == "LIGHT" and item is not spot]
        self.lamps = [(spot, spot.data.energy, max(1, settings["samples"] // 2))]
        self.lamps += [(lamp, lamp.data.energy, max(1, settings["samples"] // 2 // len(others))) for lamp in others]

    def light(self, lamp):
        """Turn off all lamps but one."""
        for item, energy, _ in self.lamps:
            item.data.energy = energy if item is lamp else 0.0

    def empty_ground(self, number, file):
        """[(black, gain)] of each lamp but the spotlight, (H, W, 4) radiances: of a black ground at the height that a shape's
        has, and what a white one adds to it. The object is out of sight then; `file` is overwritten.
        """
        shapes, ground, _ = self.scene
        cycles, render = self.bpy.context.scene.cycles, self.bpy.context.scene.render
        denoised, cycles.use_denoising, render.use_border = cycles.use_denoising, False, False
        cycles.samples, cycles.seed = GROUND_SAMPLES, 0
        for shape, _ in shapes.values():
            shape.location = PARKED
        ground.location.z = -shapes[number][1]
        parts = []
        for lamp, _, _ in self.lamps[1:]:
            self.light(lamp)
            levels = []
            for level in (0.0, 1.0):
                ground.color = (level, level, level, 1.0)
                image, pixels = radiance(self.bpy, file)
                self.bpy.data.images.remove(image)
                levels.append(pixels)
            parts.append((levels[0], levels[1] - levels[0]))
        cycles.use_denoising = denoised
        return parts

    def render(self, image):
        """Write the picture of an image (a dict, see `Renderers.render`) to its temporary file."""
        bpy, (shapes, ground, spot) = self.bpy, self.scene
        cycles, render = bpy.context.scene.cycles, bpy.context.scene.render
        number, file = image["latents"]["object_shape"], image["temporary"]
        shape = shapes[number][0]
        if number not in self.kept:
            self.kept[number] = hull(bpy, shape), self.empty_ground(number, file)
        corners, grounds = self.kept[number]
        set_latents(*self.scene, image["latents"], self.protocol)
        bpy.context.view_layer.update()
        matrix, height, color = np.array(shape.matrix_world), ground.location.z, np.array(ground.color)
        corners = corners @ matrix[:3, :3].T + matrix[:3, 3]
        size, total, picture = render.resolution_x, 0.0, None
        for k, (lamp, _, samples) in enumerate(self.lamps):
            reached = pool(spot, height) if lamp is spot else shadow(corners, lamp, height)
            box = pixel_box(bpy, None if reached is None else np.concatenate([corners, reached]))
            render.use_border, render.use_crop_to_border = True, False
            # Blender rounds down to whole pixels.
            render.border_min_x, render.border_max_x, render.border_min_y, render.border_max_y = (
                (edge + 0.25) / size for edge in box
            )
            self.light(lamp)
            cycles.samples, cycles.seed = samples, (image["seed"] + 1013904223 * k) % 2**31  # noise of its own
            if picture:
                bpy.data.images.remove(picture)
            picture, pixels = radiance(bpy, file)
            inside = slice(box[2], box[3]), slice(box[0], box[1])
            part = np.zeros_like(pixels) if lamp is spot else grounds[k - 1][0] + grounds[k - 1][1] * color
            part[inside] = pixels[inside]
            total = total + part
        total[..., 3] = 1.0
        picture.pixels.foreach_set(total.astype(np.float32).ravel())
        render.image_settings.file_format, render.image_settings.color_depth = "PNG", "8"
        picture.save_render(file, scene=bpy.context.scene)  # with the scene's view transform
        bpy.data.images.remove(picture)


def pixels_alone(png):
    """Bytes of a PNG without its texts: dates and durations would make equal images differ."""
    kept, position = [png[:8]], 8
    while position < len(png):
        end = position + 12 + int.from_bytes(png[position : position + 4], "big")
        if png[position + 4 : position + 8] in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(png[position:end])
        position = end
    return b"".join(kept)


def work():
    """A rendering process: settings, then one image a line on standard input, as JSON; answers a line for each.

    "ready", "done SECONDS" and "error MESSAGE" go to what standard output was; Blender's own lines go nowhere.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        import bpy

        if bpy.app.version < OLDEST_BLENDER:
            expected = ".".join(map(str, OLDEST_BLENDER))
            raise InputError(
                f"Blender {bpy.app.version_string} is too old, expected {expected} or newer; `make blender` installs one"
            )
        settings = json.loads(sys.stdin.readline())
        scene = build_scene(bpy, settings)
        lamp_by_lamp = None if settings["plain"] else LampByLamp(bpy, scene, settings)
        print("ready", file=answers)
        for line in sys.stdin:
            started = time.perf_counter()
            image = json.loads(line)
            if settings["plain"]:
                scene = build_scene(bpy, settings)
                set_latents(*scene, image["latents"], settings["protocol"])
                bpy.context.scene.cycles.seed = image["seed"]
                bpy.context.scene.render.filepath = image["temporary"]
                bpy.ops.render.render(write_still=True)
            else:
                lamp_by_lamp.render(image)
            temporary = Path(image["temporary"])
            temporary.write_bytes(pixels_alone(temporary.read_bytes()))
            os.replace(temporary, image["file"])
            print(f"done {time.perf_counter() - started:.6f}", file=answers)
    except ImportError as error:
        print(f"error Blender cannot be loaded ({error}); `make blender` installs it for Python 3.11", file=answers)
        return 2
    except (InputError, OSError, RuntimeError) as error:
        print("error", " ".join(str(error).split()), file=answers)
        return 2
    return 0


# --------------------------------------------------------------------------------------------------------------
# the processes that render, from one that needs no Blender


def renderer_command():
    """Command line of a rendering process: this Python where it has bpy, or the Blender that runs this script."""
    bpy = sys.modules.get("bpy")
    if bpy and bpy.app.binary_path:
        return [bpy.app.binary_path, "--background", "--factory-startup", "--python", __file__, "--", "--work"]
    if importlib.util.find_spec("bpy") is None:
        raise InputError(
            "this Python has no Blender: `make blender` installs it (package bpy, Python 3.11), then run "
            ".venv-blender/bin/python; or run this script inside Blender, see --help"
        )
    return [sys.executable, __file__, "--work"]


class Renderers:
    """Processes that render images side by side; a context manager that ends them, whatever happens.

    settings: dict of what `build_scene` and `set_up_cycles` need. Each process takes an image as soon as it has none, so that a
    slow image holds up no other. Raises InputError with a process's last words if one ends.
    """

    def __init__(self, settings, count):
        self.settings, self.count = settings, count
        self.processes, self.threads, self.ready = [], [], set()

    def __enter__(self):
        command = renderer_command()
        self.complaints = tempfile.TemporaryFile("w+")  # closed by __exit__
        # The denoiser's threads would otherwise be as many as cores in every process, bound to the same cores.
        denoiser = {"OIDN_NUM_THREADS": str(self.settings["threads"]), "OIDN_SET_AFFINITY": "0"}
        options = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": self.complaints,
            "env": {**os.environ, **denoiser, "PYTHONDONTWRITEBYTECODE": "1"},
            "start_new_session": True,
        }
        for _ in range(self.count):
            self.processes.append(subprocess.Popen(command, text=True, bufsize=1, **options))
            tell(self.processes[-1], self.settings)
        return self

    def render(self, images):
        """Yield (image, seconds) as images are done; each a dict of file, temporary, seed and latents."""
        waiting, answers = iter(images), queue.SimpleQueue()
        for process in self.processes:
            self.threads.append(threading.Thread(target=self._serve, args=(process, waiting, answers), daemon=True))
            self.threads[-1].start()
        for _ in images:
            answer = answers.get()
            if isinstance(answer, InputError):
                raise answer
            yield answer

    def _serve(self, process, waiting, answers):
        """Have a process render images, one after another, that no other process has taken from the iterator `waiting`."""
        try:
            if process not in self.ready:
                self._answer(process, "Blender did not start: it ended", "`make blender` installs one that fits")
                self.ready.add(process)
            for image in waiting:
                tell(process, image)
                kept = "the images so far are kept, and the same command continues"
                seconds = self._answer(process, f"a rendering process ended at {image['file']}", kept)
                answers.put((image, float(seconds)))
        except InputError as error:
            answers.put(error)

    def _answer(self, process, ended, advice):
        """What follows "ready" or "done" in a process's next answer; InputError if it has an error to tell, or has ended."""
        for line in process.stdout:
            word, _, rest = line.rstrip("\n").partition(" ")
            if word == "error":
                raise InputError(rest)
            if word in ("ready", "done"):
                return rest
        self.complaints.seek(0)
        words = [f" ({line.strip()})" for line in self.complaints.read().split("\n") if line.strip()]
        raise InputError(f"{ended} with code {process.wait()}{''.join(words[-1:])}; {advice}")

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
        for thread in self.threads:
            thread.join()
        for process in self.processes:
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        self.complaints.close()


def tell(process, content):
    """Hand a line of JSON to a process; one that has ended says so by itself."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(content) + "\n")


# --------------------------------------------------------------------------------------------------------------
# files


def shape_file(number):
    """File of an object shape in the assets; the object in it has the file's name."""
    return f"shapes/Shape{SHAPES[number].capitalize()}.blend"


def check_assets(assets, shapes):
    """Raise InputError that names every file that is missing for the object shapes of the latents."""
    files = [BASE_SCENE, RUBBER, *map(shape_file, shapes)]
    missing = [name for name in files if not (assets / name).is_file()]
    if missing:
        raise InputError(
            f"{assets} lacks {', '.join(missing)}; expected the folder assets of a clone of Multimodal3DIdent"
        )


def is_done(file, size):
    """Whether an image is there; InputError if it is damaged or of another size."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(24)
            stream.seek(-12, os.SEEK_END)
            tail = stream.read()
    except FileNotFoundError:
        return False
    except OSError:  # too short to hold an end
        head = tail = b""
    if head[:8] != b"\x89PNG\r\n\x1a\n" or tail[4:8] != b"IEND":
        raise InputError(f"{file} is damaged: remove it, and the same command renders it again")
    width, height = (int.from_bytes(head[start : start + 4], "big") for start in (16, 20))
    if (width, height) != (size, size):
        raise InputError(
            f"{file} has {width} × {height} pixels, not {size} × {size}: choose another folder, or remove images/"
        )
    return True


def record_origin(folder, names, origin):
    """images.json: what the images, of the set `names`, are rendered from.

    InputError if images are there already that were rendered from something else, from nobody knows what, or have other names.
    """
    path, images = folder / "images.json", folder / "images"
    # looked at before images.json: a job that starts at the same time writes that first
    there = {entry.name for _, entry in image_files(images)}
    if foreign := there - names:
        raise InputError(
            f"{images} holds {min(foreign)}, and the images of these latents are {min(names)} … {max(names)}: choose another "
            "folder, or remove images/ and images.json"
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in origin if stored[name] != origin[name]]
    except FileNotFoundError:
        if there:
            raise InputError(
                f"{images} holds images, and {path}, which says what they were rendered from, is missing: restore it, or choose "
                "another folder"
            ) from None
        differing = list(origin)
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged: remove it together with {images}") from None
    if differing and there:
        raise InputError(
            f"{images} was rendered with other {', '.join(differing)} ({path}): choose another folder, or remove both"
        )
    if differing:
        write_json(path, origin)


def batch_indices(count, n_batches, batch_index):
    """Range of the images of one batch: the batches are contiguous, of equal size within one, and cover 0 … count − 1."""
    return range(count * batch_index // n_batches, count * (batch_index + 1) // n_batches)


# --------------------------------------------------------------------------------------------------------------


def parse_flags(argv):
    """The Namespace of the command line."""
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="\n\n".join(__doc__.split("\n\n")[1:]))
    parser.add_argument("--output-folder", type=Path, required=True, metavar="DIR", help="folder of the data set")
    none = "folder assets of a clone of Multimodal3DIdent (none: stand-in shapes)"
    parser.add_argument("--assets", type=Path, metavar="DIR", help=none)
    parser.add_argument("--samples", type=integer(1), default=128, help="samples of a pixel (%(default)s)")
    parser.add_argument("--size", type=integer(8), default=128, help="pixels of an image's side (%(default)s)")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the sampling noise (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda", "optix"), default="cpu", help="(%(default)s)")
    workers = "rendering processes (CPU: one a core, of one thread each; GPU: one)"
    parser.add_argument("--workers", type=integer(1), help=workers)
    batches = "parts of the data set, for job arrays (%(default)s)"
    parser.add_argument("--n-batches", type=integer(1), default=1, help=batches)
    parser.add_argument("--batch-index", type=integer(0), default=0, help="the part to render, from 0 (%(default)s)")
    hues = (
        "hues of ground and spotlight below 0: as colorsys takes them, closer to the published data set's statistics (code), "
        "or wrapped, as the formula reads (paper) (%(default)s)"
    )
    parser.add_argument("--protocol", choices=("code", "paper"), default="code", help=hues)
    plain = "the plain way: lamps at once, denoised, the scene loaded for each image"
    parser.add_argument("--plain", action="store_true", help=plain)
    args = parser.parse(argv)[0]
    if args.batch_index >= args.n_batches:
        raise InputError(
            f"--batch-index {args.batch_index} is out of range: --n-batches {args.n_batches} has the batches "
            f"0 … {args.n_batches - 1}"
        )
    return args


def render_settings(args, shapes, threads):
    """Dict of what a rendering process needs to know: JSON."""
    told = {name: getattr(args, name) for name in ("samples", "size", "device", "plain", "protocol")}
    return told | {
        "assets": args.assets and str(args.assets.resolve()),
        "shapes": shapes,
        "denoise": True,
        "threads": threads,
    }


def report(done, total, started):
    """Print progress: images so far, images per second and the time left."""
    rate = done / max(time.perf_counter() - started, 1e-9)
    left = datetime.timedelta(seconds=round((total - done) / rate)) if done else "unknown"
    print(f"image {done:,}/{total:,}  {rate:.2f} images/s, {left} left", flush=True)


def stop(number, frame):
    """Signal handler: SIGTERM ends the script as Ctrl-C does, inside Blender too."""
    raise KeyboardInterrupt


def main(argv=None):
    """Render the images of one batch that are not there yet; returns the exit code."""
    args = parse_flags(argv)
    table = read_latents(args.output_folder / "latents_image.csv", CAUSAL_IMAGE)
    latents = [dict(zip(table, row, strict=True)) for row in zip(*map(np.ndarray.tolist, table.values()), strict=True)]
    shapes = sorted({row["object_shape"] for row in latents})
    if args.assets:
        check_assets(args.assets, shapes)
    renderer_command()
    folder, digits = args.output_folder / "images", len(str(len(latents) - 1))
    folder.mkdir(exist_ok=True)
    for place in (args.output_folder, folder):  # a folder that cannot be written is found before Blender starts
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise InputError(f"{place} cannot be written ({error.strerror}); choose another --output-folder") from None
    for part in folder.glob(".*.part"):  # of a process that was killed
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()
    names = [f"{index:0{digits}d}.png" for index in range(len(latents))]
    origin = {"latents": latents_digest(args.output_folder), "shapes": "assets" if args.assets else "stand-ins"}
    origin |= {name: getattr(args, name) for name in ("size", "samples", "seed", "protocol", "plain")}
    record_origin(args.output_folder, set(names), origin)
    batch = batch_indices(len(latents), args.n_batches, args.batch_index)
    images, run = [], secrets.token_hex(4)  # two runs of the same command shall not write into the same file
    for index in batch:
        file = (folder / names[index]).resolve()
        if not is_done(folder / names[index], args.size):
            seed = int.from_bytes(hashlib.sha256(f"{args.seed}/{index}".encode()).digest()[:4], "big") >> 1
            temporary = file.with_name(f".{file.name}.{run}.part")
            images.append({"file": str(file), "temporary": str(temporary), "seed": seed, "latents": latents[index]})
    if not args.assets:
        print(f"no --assets: stand-in shapes instead of the data set's ({', '.join(STANDINS)} for {', '.join(SHAPES)})")
    if not images:
        print(f"{folder}: all {len(batch):,} images of this batch are there already")
        return 0
    workers = min(args.workers or (usable_cores() if args.device == "cpu" else 1), len(images))
    # On the CPU one thread each, whatever the number of processes: the last bits of an image depend on it.
    threads = 1 if args.device == "cpu" else max(1, usable_cores() // workers)
    print(
        f"{folder}: {len(images):,} images of {args.size} × {args.size}, {len(batch) - len(images):,} there already; "
        f"{args.device}, {workers} processes",
        flush=True,
    )
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    done, started, reported = 0, None, 0.0
    try:
        with Renderers(render_settings(args, shapes, threads), workers) as renderers:
            for done, (_, seconds) in enumerate(renderers.render(images), 1):
                started = started or time.perf_counter() - seconds
                if time.perf_counter() - reported > PROGRESS_SECONDS or done == len(images):
                    reported = time.perf_counter()
                    report(done, len(images), started)
    except KeyboardInterrupt:
        print(f"stopped after {done:,} of {len(images):,} images; the same command continues", flush=True)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one of Blender's own, not of Python's
        for image in images:
            Path(image["temporary"]).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    arguments = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else sys.argv[1:]
    if arguments == ["--work"]:
        sys.exit(work())
    run_script(lambda: main(arguments))
